"""Triton kernels: per-example gradient norms, clipped sums. Imported only where they run: a CPU needs no triton.

Shapes: N examples, T positions, d inputs, p outputs. A norm's program takes one tile of one example's products, squares
or multiplies it while it is in registers, and writes one number; `tiled.squared_norms` adds up the numbers. A sum's
program takes one tile of the weight and weighs one example's product after the other. There are no atomics, so a
launch is deterministic. How they are called is in `kernel_calls`.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    operand,
    example,
    by_example,
    by_position,
    by_feature,
    positions,
    features,
    position,
    feature,
    POSITIONS: tl.constexpr,
    FEATURES: tl.constexpr,
    LAYOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return a (POSITIONS, FEATURES) tile of one example of a (N, T, D) operand; zeros past the edges.

    Fetched by a descriptor (Hopper's tensor memory accelerator) of the operand, "positions first", or of its (N, D, T)
    transpose, "features first"; or by a pointer, whatever the strides; offsets are int64.
    """
    if LAYOUT == "positions first":
        tile = operand.load([example, position, feature]).reshape(POSITIONS, FEATURES)
    elif LAYOUT == "features first":
        tile = operand.load([example, feature, position]).reshape(FEATURES, POSITIONS).T
    else:
        tl.static_assert(LAYOUT == "pointers")
        rows = position + tl.arange(0, POSITIONS)
        columns = feature + tl.arange(0, FEATURES)
        place = operand + tl.cast(example, tl.int64) * by_example
        place += rows.to(tl.int64)[:, None] * by_position + columns.to(tl.int64)[None, :] * by_feature
        tile = tl.load(place, mask=(rows < positions)[:, None] & (columns < features)[None, :], other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _gram(  # type: ignore[no-untyped-def]
    operand,
    example,
    by_example,
    by_position,
    by_feature,
    positions,
    features,
    j,
    k,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LAYOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the inner products of positions from j on with those from k on, (TILE, TILE) float32.

    "ieee" multiplies float32 operands as they are: TF32 would put an error of 1e-3 into the norm.
    """
    gram = tl.zeros((TILE, TILE), tl.float32)
    for feature in range(0, features, BLOCK):
        x = _tile(
            operand, example, by_example, by_position, by_feature, positions, features, j, feature,
            TILE, BLOCK, LAYOUT, UPCAST,
        )  # fmt: skip
        y = _tile(
            operand, example, by_example, by_position, by_feature, positions, features, k, feature,
            TILE, BLOCK, LAYOUT, UPCAST,
        )  # fmt: skip
        gram = tl.dot(x, y.T, gram, input_precision="ieee")
    return gram


@triton.jit
def gram_kernel(  # type: ignore[no-untyped-def]
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    partial,
    positions,
    width,
    out_width,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write ``sum(A_j A_k^T * G_j G_k^T)``, twice that off the diagonal, for one example and one pair j <= k.

    As many numbers further on as there are programs, the sum of the same terms' absolute values.

    The triangle of pairs is folded into a rectangle: a row of it holds tile row `upper`, then tile row `lower` from
    the other end, which together are as long as every other row's.
    """
    tiles = tl.cdiv(positions, TILE)
    pairs = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    example = program // pairs
    folded = tiles + 1 - tiles % 2
    upper = program % pairs // folded
    place = program % pairs % folded
    lower = tiles - 1 - upper + tiles % 2
    in_upper = place < tiles - upper
    j = tl.where(in_upper, upper, lower)
    k = j + tl.where(in_upper, place, place - (tiles - upper))
    gram_a = _gram(
        a, example, a_example, a_position, a_feature, positions, width, j * TILE, k * TILE,
        TILE, BLOCK, A_LAYOUT, UPCAST,
    )  # fmt: skip
    gram_g = _gram(
        g, example, g_example, g_position, g_feature, positions, out_width, j * TILE, k * TILE,
        TILE, BLOCK, G_LAYOUT, UPCAST,
    )  # fmt: skip
    terms = gram_a * gram_g
    weight = tl.where(j == k, 1.0, 2.0)
    tl.store(partial + program, weight * tl.sum(tl.sum(terms, 1), 0))
    tl.store(partial + tl.num_programs(0) + program, weight * tl.sum(tl.sum(tl.abs(terms), 1), 0))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    total,
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    positions,
    width,
    out_width,
    example,
    position,
    row,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return `total` plus a (ROWS, COLUMNS) tile of one example's ``g^T a`` over BLOCK positions from `position` on."""
    y = _tile(
        g, example, g_example, g_position, g_feature, positions, out_width, position, row,
        BLOCK, ROWS, G_LAYOUT, UPCAST,
    )  # fmt: skip
    x = _tile(
        a, example, a_example, a_position, a_feature, positions, width, position, column,
        BLOCK, COLUMNS, A_LAYOUT, UPCAST,
    )  # fmt: skip
    return tl.dot(y.T, x, total, input_precision="ieee")


@triton.jit
def direct_kernel(  # type: ignore[no-untyped-def]
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    partial,
    kept,
    positions,
    width,
    out_width,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write the sum of squares of one (TILE, TILE) tile of one example's gradient ``g^T a``; if KEEP, the tile too."""
    across = tl.cdiv(width, TILE)
    tiles = tl.cdiv(out_width, TILE) * across
    program = tl.program_id(0)
    example = program // tiles
    row = program % tiles // across * TILE
    column = program % tiles % across * TILE
    gradient = tl.zeros((TILE, TILE), tl.float32)
    for position in range(0, positions, BLOCK):
        gradient = _gradient(
            gradient, a, a_example, a_position, a_feature, g, g_example, g_position, g_feature,
            positions, width, out_width, example, position, row, column,
            TILE, TILE, BLOCK, A_LAYOUT, G_LAYOUT, UPCAST,
        )  # fmt: skip
    if KEEP:
        rows = row + tl.arange(0, TILE)
        columns = column + tl.arange(0, TILE)
        target = (tl.cast(example, tl.int64) * out_width + rows[:, None]) * width + columns[None, :]
        tl.store(kept + target, gradient, mask=(rows < out_width)[:, None] & (columns < width)[None, :])
    tl.store(partial + program, tl.sum(tl.sum(gradient * gradient, 1), 0))


@triton.jit
def finished_kernel(  # type: ignore[no-untyped-def]
    partial,
    squares,
    programs,
    lost_share,
    cancelled,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one example's squared norm: the sum of its addends, `not_below` what rounding took, and not below 0."""
    example = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    row = partial + example * programs
    further = tl.num_programs(0).to(tl.int64) * programs
    total = tl.zeros((BLOCK,), tl.float64)
    sizes = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        valid = index < programs - start
        total += tl.load(row + start + index, mask=valid, other=0.0).to(tl.float64)
        if SIZES:
            sizes += tl.load(row + further + start + index, mask=valid, other=0.0).to(tl.float64)
    square = tl.sum(total, 0).to(tl.float32)
    if SIZES:
        lost = lost_share * tl.sum(sizes, 0).to(tl.float32)
        square = tl.where(lost > cancelled * square, square + lost, square)
    tl.store(squares + example, tl.where(square < 0, 0.0, square))


@triton.jit
def weighted_sum_kernel(  # type: ignore[no-untyped-def]
    a,
    a_example,
    a_position,
    a_feature,
    g,
    g_example,
    g_position,
    g_feature,
    factors,
    out,
    examples,
    examples_a_split,
    positions,
    width,
    out_width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    A_LAYOUT: tl.constexpr,
    G_LAYOUT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write one (ROWS, COLUMNS) tile of ``sum_i c_i g_i^T a_i`` over a group of examples, or add it to what is there.

    A product is complete before it is weighed: weighing an operand would round it. It is WHOLE, of all positions of an
    example, or of BLOCK positions; then one loop over those of all examples fetches across the border between two.
    What a dropped example, whose factor is 0, holds does not matter, be it infinity.
    """
    across = tl.cdiv(width, COLUMNS)
    down = tl.cdiv(out_width, ROWS)
    program = tl.program_id(0)
    split = program // (down * across)
    place = program % (down * across)
    if across <= down:  # programs that run at once share operands: they lie in a block, not in a stripe
        row = place // across * ROWS
        column = place % across * COLUMNS
    else:
        row = place % down * ROWS
        column = place // down * COLUMNS
    first = split * examples_a_split
    last = min(first + examples_a_split, examples)
    blocks = tl.cdiv(positions, BLOCK)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if WHOLE:
        for example in range(first, last):
            factor = tl.load(factors + example)
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for position in range(0, positions, BLOCK):
                product = _gradient(
                    product, a, a_example, a_position, a_feature, g, g_example, g_position, g_feature,
                    positions, width, out_width, example, position, row, column,
                    ROWS, COLUMNS, BLOCK, A_LAYOUT, G_LAYOUT, UPCAST,
                )  # fmt: skip
            total += tl.where(factor == 0, 0.0, factor * product)
    else:
        for step in range(first * blocks, last * blocks):
            example = step // blocks
            position = step % blocks * BLOCK
            factor = tl.load(factors + example)
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            product = _gradient(
                product, a, a_example, a_position, a_feature, g, g_example, g_position, g_feature,
                positions, width, out_width, example, position, row, column,
                ROWS, COLUMNS, BLOCK, A_LAYOUT, G_LAYOUT, UPCAST,
            )  # fmt: skip
            total += tl.where(factor == 0, 0.0, factor * product)
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    target = (split.to(tl.int64) * out_width + rows[:, None]) * width + columns[None, :]
    inside = (rows < out_width)[:, None] & (columns < width)[None, :]
    if ADD:
        total += tl.load(out + target, mask=inside, other=0.0)
    tl.store(out + target, total, mask=inside)
