"""From records to tables, figures and one page: frames, figures, markdown, html, report."""
