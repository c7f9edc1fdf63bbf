"""The kernels, in Triton: tiles of logits that live in registers, and what is taken from them.

Two passes over the tiles. `facts_kernel` (forward) keeps, for each token, a few running numbers of the softmax;
`gradient_kernel` (backward) computes the tiles again and writes the derivative by the logits, for a strip of the
vocabulary, into a workspace from which two plain products make the gradients. `sparse_product_kernel` is one of these
products where a filter leaves tiles out.

Nothing waits for another program: no locks, no atomics, so results do not depend on the order in which programs run.
Addresses are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NOT_HERE = tl.constexpr(-1)
"""In `labels`: the target's column is another rank's."""
IGNORED = tl.constexpr(-2)

# What SMOOTHING can be: none, Σ w·z, or Σ w·exp((tau − 1)·(z − largest)).
OF_LOGITS = tl.constexpr(1)
OF_POWERS = tl.constexpr(2)


@triton.jit
def load_tile(
    source,
    start_row,
    start_column,
    rows,
    columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """(ROWS, COLUMNS) of a matrix from a place on, 0 beyond its end; EVEN: columns is a multiple of COLUMNS."""
    if DESCRIPTORS:
        tile = source.load([start_row, start_column])
    else:
        row = start_row + tl.arange(0, ROWS)
        column = start_column + tl.arange(0, COLUMNS)
        places = source + row.to(tl.int64)[:, None] * stride + column[None, :]
        there = row[:, None] < rows
        if not EVEN:
            there = there & (column[None, :] < columns)
        tile = tl.load(places, mask=there, other=0.0)
    return tile


@triton.jit
def logits_tile(
    hidden,
    weight,
    bias,
    start_token,
    start_column,
    tokens,
    columns,
    width,
    hidden_stride,
    weight_stride,
    softcap,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Final logits (BLOCK_N, BLOCK_V) in fp32, −inf beyond the last column; and the softcap's slope, 1 − tanh²."""
    product = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        x = load_tile(hidden, start_token, start, tokens, width, hidden_stride, BLOCK_N, BLOCK_D, DESCRIPTORS, EVEN)
        w = load_tile(weight, start_column, start, columns, width, weight_stride, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        product = tl.dot(x, w.T, product, input_precision=PRECISION)
    column = start_column + tl.arange(0, BLOCK_V)
    if HAS_BIAS:
        product += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    slope = 1.0
    if SOFTCAP:
        # tanh x = 1 − 2r with r = 1 / (1 + exp 2x) ends well at both ends; near 0 its series has the digits.
        x = product / softcap
        r = 1.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E)))
        slope = 4.0 * r * (1.0 - r)
        s = x * x
        series = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
        product = softcap * tl.where(s < 0.0625, series, 1.0 - 2.0 * r)
    if SCALED:
        product *= scale
    if MASKED and start_column + BLOCK_V > columns:
        product = tl.where((column < columns)[None, :], product, float("-inf"))
    return product, slope


@triton.jit
def facts_kernel(
    hidden,
    weight,
    bias,
    class_weights,
    labels,
    facts,
    tops,
    tile_lses,
    tokens,
    columns,
    width,
    hidden_stride,
    weight_stride,
    tiles_a_split,
    softcap,
    scale,
    power,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASSES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP: tl.constexpr,
    TILE_LSES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running facts of each token's softmax, over each of `splits` ranges of columns.

    hidden         (tokens, width), weight (columns, width): pointers, or with DESCRIPTORS tensor descriptors
    bias           (columns,); class_weights (columns,) fp32
    labels         (tokens,) int32: a column, NOT_HERE or IGNORED; a tile of ignored tokens alone is skipped
    facts          (6, splits, tokens) fp32: the largest logit m; Σ exp(z − m) without the label's column; the label's
                   logit, 0 where its column is not in the range; and, where asked for, the smoothing sum, Σ exp(z − m)
                   and Σ exp(z − m)·(z − m)
    tops           (splits, tokens) int32: the first column of the largest logit
    tile_lses      (tokens, tiles) fp32: each tile's log-sum-exp
    power          tau − 1
    """
    token_tiles = tl.cdiv(tokens, BLOCK_N)
    column_tiles = tl.cdiv(columns, BLOCK_V)
    splits = tl.cdiv(column_tiles, tiles_a_split)
    for item in range(tl.program_id(0), token_tiles * splits, tl.num_programs(0)):
        # Programs that run at the same time share a range of columns, whose weight the cache then holds.
        start_token = (item % token_tiles) * BLOCK_N
        split = item // token_tiles
        token = start_token + tl.arange(0, BLOCK_N)
        label = tl.load(labels + token, mask=token < tokens, other=IGNORED)
        largest = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
        others = tl.zeros((BLOCK_N,), dtype=tl.float32)
        label_logit = tl.zeros((BLOCK_N,), dtype=tl.float32)
        smoothing = tl.zeros((BLOCK_N,), dtype=tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
        top = tl.zeros((BLOCK_N,), dtype=tl.int32)
        first_tile = split * tiles_a_split
        end_tile = tl.minimum(first_tile + tiles_a_split, column_tiles)
        if tl.max(label, 0) == IGNORED:
            end_tile = first_tile
        for tile in range(first_tile, end_tile):
            start_column = tile * BLOCK_V
            z, _ = logits_tile(
                hidden, weight, bias, start_token, start_column, tokens, columns, width, hidden_stride, weight_stride,
                softcap, scale, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN, HAS_BIAS, SOFTCAP, SCALED, UPCAST,
                PRECISION,
            )  # fmt: skip
            own = label - start_column
            here = (own >= 0) & (own < BLOCK_V)
            has_labels = tl.max(here.to(tl.int32), 0) > 0  # few tiles have
            if has_labels:
                hit = tl.arange(0, BLOCK_V)[None, :] == own[:, None]
                label_logit += tl.sum(tl.where(hit, z, 0.0), 1)
            tile_largest = tl.max(z, 1)
            if TOP:
                first = start_column + tl.argmax(z, 1, tie_break_left=True).to(tl.int32)
                top = tl.where(tile_largest > largest, first, top)
            before = largest
            largest = tl.maximum(largest, tile_largest)
            finite = tl.where(largest == float("-inf"), 0.0, largest)
            centred = z - finite[:, None]
            exponentials = tl.exp2(centred * LOG2_E)
            fading = tl.exp2((before - finite) * LOG2_E)
            if SMOOTHING != 0:
                column = start_column + tl.arange(0, BLOCK_V)
                kind = 1.0
                if HAS_CLASSES:
                    kind = tl.load(class_weights + column, mask=column < columns, other=0.0)[None, :]
                if SMOOTHING == OF_LOGITS:
                    smoothing += tl.sum(tl.where((column < columns)[None, :], kind * z, 0.0), 1)
                else:
                    powers = kind * tl.exp2(centred * (power * LOG2_E))
                    kept = tl.where(
                        before == float("-inf"), 0.0, smoothing * tl.exp2((before - finite) * (power * LOG2_E))
                    )
                    smoothing = kept + tl.sum(tl.where((column < columns)[None, :], powers, 0.0), 1)
            if ENTROPY or TILE_LSES:
                tile_total = tl.sum(exponentials, 1)
            if ENTROPY:
                # Moving the reference from `before` to `finite` adds total · (before − finite) to the weighted sum.
                moved = tl.where(before == float("-inf"), 0.0, before - finite)
                products = tl.where(exponentials == 0.0, 0.0, exponentials * centred)
                weighted = (weighted + total * moved) * fading + tl.sum(products, 1)
                total = total * fading + tile_total
            if TILE_LSES:
                places = tile_lses + token.to(tl.int64) * column_tiles + tile
                tl.store(places, finite + tl.log2(tile_total) / LOG2_E, mask=token < tokens)
            if has_labels:
                hit = tl.arange(0, BLOCK_V)[None, :] == own[:, None]
                tile_others = tl.sum(tl.where(hit, 0.0, exponentials), 1)
            else:
                tile_others = tl.sum(exponentials, 1)
            others = others * fading + tile_others
        plane = tl.cast(splits, tl.int64) * tokens
        places = facts + tl.cast(split, tl.int64) * tokens + token
        tl.store(places, largest, mask=token < tokens)
        tl.store(places + plane, others, mask=token < tokens)
        tl.store(places + 2 * plane, label_logit, mask=token < tokens)
        if SMOOTHING != 0:
            tl.store(places + 3 * plane, smoothing, mask=token < tokens)
        if ENTROPY:
            tl.store(places + 4 * plane, total, mask=token < tokens)
            tl.store(places + 5 * plane, weighted, mask=token < tokens)
        if TOP:
            tl.store(tops + tl.cast(split, tl.int64) * tokens + token, top, mask=token < tokens)


@triton.jit
def gradient_kernel(
    hidden,
    weight,
    bias,
    class_weights,
    labels,
    coefficients,
    tops,
    kept,
    gradient,
    bias_sums,
    start_strip,
    end_strip,
    tokens,
    columns,
    width,
    hidden_stride,
    weight_stride,
    gradient_stride,
    softcap,
    scale,
    power,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASSES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP: tl.constexpr,
    FILTERED: tl.constexpr,
    BIAS_SUMS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The derivative by the logits before softcap, of all tokens and the columns from start_strip, a multiple of
    BLOCK_V, to end_strip, in the dtype of `gradient`.

    coefficients   (7, tokens) fp32, of a token's logits z: the largest logit m; what makes exp(z − m) the probability
                   times its coefficient; the entry of the label; and, where used, log Σ exp(z − m), the coefficients
                   of −p·log p and of −w·p^(tau − 1), and what is added at the largest logit. Of an ignored token
                   inf for m, and 0
    gradient       (tokens, strip) with gradient_stride
    bias_sums      (token tiles, strip) fp32: sums over each tile's tokens
    kept           (token tiles, column tiles of all columns) int8: with FILTERED, tiles that are 0 there are neither
                   computed nor written
    The rest as in facts_kernel.
    """
    strip_tiles = tl.cdiv(end_strip - start_strip, BLOCK_V)
    token_tiles = tl.cdiv(tokens, BLOCK_N)
    for item in range(tl.program_id(0), token_tiles * strip_tiles, tl.num_programs(0)):
        token_tile = item // strip_tiles
        column_tile = item % strip_tiles
        start_token = token_tile * BLOCK_N
        start_column = start_strip + column_tile * BLOCK_V
        token = start_token + tl.arange(0, BLOCK_N)
        column = start_column + tl.arange(0, BLOCK_V)
        wanted = True
        if FILTERED:
            tiles = tl.cast(tl.cdiv(columns, BLOCK_V), tl.int64)
            wanted = tl.load(kept + token_tile * tiles + start_column // BLOCK_V) != 0
        if wanted:
            z, slope = logits_tile(
                hidden, weight, bias, start_token, start_column, tokens, columns, width, hidden_stride, weight_stride,
                softcap, scale, BLOCK_N, BLOCK_V, BLOCK_D, DESCRIPTORS, EVEN, HAS_BIAS, SOFTCAP, SCALED, UPCAST,
                PRECISION, MASKED=False,
            )  # fmt: skip
            there = token < tokens
            places = coefficients + token
            plane = tl.cast(tokens, tl.int64)
            largest = tl.load(places, mask=there, other=float("inf"))
            factor = tl.load(places + plane, mask=there, other=0.0)
            entry = tl.load(places + 2 * plane, mask=there, other=0.0)
            label = tl.load(labels + token, mask=there, other=IGNORED)
            centred = z - largest[:, None]
            values = tl.exp2(centred * LOG2_E) * factor[:, None]
            if ENTROPY or SMOOTHING == OF_POWERS:
                log_sum = tl.load(places + 3 * plane, mask=there, other=0.0)
                log_p = centred - log_sum[:, None]
            if ENTROPY:
                of_entropy = tl.load(places + 4 * plane, mask=there, other=0.0)
                p = tl.exp2(log_p * LOG2_E)
                values -= tl.where(p == 0.0, 0.0, p * log_p) * of_entropy[:, None]
            if SMOOTHING != 0:
                of_smoothing = tl.load(places + 5 * plane, mask=there, other=0.0)
                kind = of_smoothing[:, None]
                if HAS_CLASSES:
                    kind = kind * tl.load(class_weights + column, mask=column < columns, other=0.0)[None, :]
                if SMOOTHING == OF_POWERS:
                    kind = tl.where(kind == 0.0, 0.0, kind * tl.exp2(log_p * (power * LOG2_E)))
                values -= tl.where((column < columns)[None, :], kind, 0.0)
            values = tl.where(column[None, :] == label[:, None], entry[:, None], values)
            if TOP:
                of_top = tl.load(places + 6 * plane, mask=there, other=0.0)
                top = tl.load(tops + token, mask=there, other=-1)
                values += tl.where(column[None, :] == top[:, None], of_top[:, None], 0.0)
            if SOFTCAP:
                values *= slope
            if BIAS_SUMS:
                sums = bias_sums + tl.cast(token_tile, tl.int64) * (end_strip - start_strip) + (column - start_strip)
                tl.store(sums, tl.sum(values, 0), mask=column < end_strip)
            row = token.to(tl.int64)[:, None] * gradient_stride
            tl.store(
                gradient + row + (column - start_strip)[None, :],
                values.to(gradient.dtype.element_ty),
                mask=there[:, None] & (column < end_strip)[None, :],
            )


@triton.jit
def sparse_product_kernel(
    left,
    right,
    result,
    kept,
    rows,
    inner,
    width,
    left_row_stride,
    left_inner_stride,
    right_stride,
    result_stride,
    kept_row_stride,
    kept_inner_stride,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """result (rows, width) [+]= left (rows, inner) · right (inner, width), of those tiles (BLOCK_R, BLOCK_I) of `left`
    for which `kept` is not 0; the others are not read. result in fp32. BLOCK_K divides BLOCK_I."""
    width_tiles = tl.cdiv(width, BLOCK_D)
    row_tile = tl.program_id(0) // width_tiles
    start_width = (tl.program_id(0) % width_tiles) * BLOCK_D
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    place = start_width + tl.arange(0, BLOCK_D)
    there = (row < rows)[:, None] & (place < width)[None, :]
    places = result + row.to(tl.int64)[:, None] * result_stride + place[None, :]
    product = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for tile in range(tl.cdiv(inner, BLOCK_I)):
        if (
            tl.load(kept + row_tile * tl.cast(kept_row_stride, tl.int64) + tile * tl.cast(kept_inner_stride, tl.int64))
            != 0
        ):
            for start in range(tile * BLOCK_I, (tile + 1) * BLOCK_I, BLOCK_K):
                index = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                a = tl.load(
                    left + row.to(tl.int64)[:, None] * left_row_stride + index[None, :] * left_inner_stride,
                    mask=(row < rows)[:, None] & (index < inner)[None, :],
                    other=0.0,
                )
                b = tl.load(
                    right + index[:, None] * right_stride + place[None, :],
                    mask=(index < inner)[:, None] & (place < width)[None, :],
                    other=0.0,
                )
                if UPCAST:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                product = tl.dot(a, b, product, input_precision=PRECISION)
    if ADD:
        product += tl.load(places, mask=there, other=0.0)
    tl.store(places, product, mask=there)
