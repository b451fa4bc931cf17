"""What a measurement is made of: configuration, schema, store, environment, meters, the loop."""
