/* What a deflate block costs in bits, without writing it: the three forms of RFC 1951 and the choice between them.

   The code lengths are those that zlib's deflate arrives at, whose order of merging nodes of equal frequency decides
   how well the lengths themselves compress: a heap ordered by (frequency, height) with zlib's way of sifting. */
#ifndef HARNESS_HUFFMAN_H
#define HARNESS_HUFFMAN_H

#include <stdint.h>
#include <string.h>

enum {
    END_OF_BLOCK = 256,
    LITERAL_CODES = 286,
    DISTANCE_CODES = 30,
    LENGTH_CODES = 19, /* of the code lengths: 0 to 15, repeat the last, few zeros, many zeros */
    REPEAT = 16,
    FEW_ZEROS = 17,
    MANY_ZEROS = 18,
    MIN_MATCH = 3,
    MAX_MATCH = 258,
    BLOCK_SYMBOLS = 16383 /* a block ends with this many: zlib's buffer at memLevel 8, less one */
};

typedef struct {
    uint16_t literal[288];    /* how often each literal, and each length's code from 257 on */
    uint16_t distance[32];    /* how often each distance's code */
    uint64_t literal_used[5]; /* a bit for each code that occurs */
    uint64_t distance_used;
    uint32_t symbols;
} Counts;

static uint8_t code_of_length[256];      /* of length - 3; the symbol is 257 more */
static uint8_t static_literal_bits[288]; /* in a fixed block, extra bits included */
static uint8_t extra_literal_bits[288];

static int top_bit(uint32_t value) { return 31 - __builtin_clz(value); }

static void fill_code_tables(void)
{
    for (int n = 0; n < 256; n++) {
        int top = n < 8 ? 0 : top_bit((uint32_t)n);
        code_of_length[n] = (uint8_t)(n < 8 ? n : n == 255 ? 28 : 4 * (top - 1) + ((n >> (top - 2)) & 3));
    }
    for (int symbol = 0; symbol < 288; symbol++) {
        int code = symbol - 257;
        int extra = code < 8 || code >= 28 ? 0 : code / 4 - 1;
        extra_literal_bits[symbol] = (uint8_t)extra;
        int bits = symbol < 144 ? 8 : symbol < 256 ? 9 : symbol < 280 ? 7 : 8;
        static_literal_bits[symbol] = (uint8_t)(bits + extra);
    }
}

static inline void begin_block(Counts *counts)
{
    memset(counts, 0, sizeof *counts);
    counts->literal[END_OF_BLOCK] = 1;
    counts->literal_used[END_OF_BLOCK / 64] = 1;
}

static inline void count_literal(Counts *counts, unsigned byte)
{
    counts->literal[byte]++;
    counts->literal_used[byte / 64] |= (uint64_t)1 << (byte % 64);
    counts->symbols++;
}

static inline void count_match(Counts *counts, int length, int distance)
{
    unsigned symbol = 257u + code_of_length[length - MIN_MATCH];
    unsigned d = (unsigned)distance - 1;
    int top = top_bit(d | 1);
    unsigned code = d < 2 ? d : 2u * (unsigned)top + ((d >> (top - 1)) & 1);
    counts->literal[symbol]++;
    counts->literal_used[symbol / 64] |= (uint64_t)1 << (symbol % 64);
    counts->distance[code]++;
    counts->distance_used |= (uint64_t)1 << code;
    counts->symbols++;
}

/* A node in the heap: frequency (from bit 15), height (5 bits), index (10 bits). Frequencies add up to 16,385 at most,
   so no tree is 32 high. Two nodes compare by all but the index: `a` is not after `b` when a <= (b | 1023). */
enum { HEIGHT_SHIFT = 10, FREQUENCY_SHIFT = 15, INDEX_MASK = 1023 };
#define NO_NODE UINT32_MAX

/* Put `node` in the root's place and let it sink `levels` deep, or less: where zlib stops on the way down at the first
   node that is not before it, this goes to the bottom and comes back up to the same place, since its way is settled by
   the smaller child each time. The places below the last one in use hold NO_NODE. */
static inline void sink(uint32_t *heap, int levels, uint32_t node)
{
    int place = 1;
    uint32_t left = heap[2], right = heap[3];
    for (int level = levels; level > 0; level--) {
        const uint32_t *below = heap + 4 * place; /* both children's children: loaded before the choice is known */
        uint32_t left_left = below[0], left_right = below[1], right_left = below[2], right_right = below[3];
        uint32_t chosen = right <= (left | INDEX_MASK), mask = 0 - chosen;
        heap[place] = left ^ ((left ^ right) & mask);
        place = 2 * place + (int)chosen;
        left = left_left ^ ((left_left ^ right_left) & mask);
        right = left_right ^ ((left_right ^ right_right) & mask);
    }
    while (place > 1 && node <= (heap[place >> 1] | INDEX_MASK)) {
        heap[place] = heap[place >> 1];
        place >>= 1;
    }
    heap[place] = node;
}

/* The same from any place, stopping on the way: for the first ordering. */
static inline void settle(uint32_t *heap, int count, int place)
{
    uint32_t node = heap[place];
    for (int child; (child = place * 2) <= count; place = child) {
        child += heap[child + 1] <= (heap[child] | INDEX_MASK);
        if (node <= (heap[child] | INDEX_MASK))
            break;
        heap[place] = heap[child];
    }
    heap[place] = node;
}

typedef struct {
    int symbols;             /* how many occur, at least two: deflate adds unused ones to what has fewer */
    uint16_t symbol[288];    /* which, ascending */
    uint16_t frequency[288]; /* 0 for one that was added */
    uint8_t length[576];     /* each one's code length, then the inner nodes' depths */
} Code;

/* Fill length[]; return the bits of all symbols' codes. */
static int64_t build_code(Code *code, int max_length)
{
    uint32_t heap[1160];
    uint16_t child[288][2];
    int n = code->symbols, count = n, inner = 0, overflow = 0;
    for (int i = 0; i < n; i++) {
        uint32_t frequency = code->frequency[i] ? code->frequency[i] : 1;
        heap[i + 1] = frequency << FREQUENCY_SHIFT | (uint32_t)i;
    }
    for (int i = n + 1; i < 2 * n + 2; i++)
        heap[i] = NO_NODE;
    for (int place = n / 2; place >= 1; place--)
        settle(heap, count, place);
    for (;;) {
        uint32_t first = heap[1], last = heap[count];
        heap[count--] = NO_NODE;
        sink(heap, top_bit((uint32_t)count), last);
        uint32_t second = heap[1];
        child[inner][0] = first & INDEX_MASK;
        child[inner][1] = second & INDEX_MASK;
        uint32_t height = first >> HEIGHT_SHIFT & 31, other = second >> HEIGHT_SHIFT & 31;
        height = (height > other ? height : other) + 1;
        uint32_t sum = (first >> FREQUENCY_SHIFT) + (second >> FREQUENCY_SHIFT);
        uint32_t node = sum << FREQUENCY_SHIFT | height << HEIGHT_SHIFT | (uint32_t)(n + inner);
        inner++;
        if (count == 1)
            break;
        sink(heap, top_bit((uint32_t)count), node);
    }
    code->length[n + inner - 1] = 0;
    for (int i = inner - 1; i >= 0; i--) {
        int length = code->length[n + i] + 1;
        if (length > max_length) {
            length = max_length;
            overflow += 2;
        }
        code->length[child[i][0]] = code->length[child[i][1]] = (uint8_t)length;
    }
    if (overflow > 0) { /* shorten what is too long at the cost of what is short, rarest symbols first */
        int with_length[16] = {0};
        for (int i = 0; i < n; i++)
            with_length[code->length[i]]++;
        for (; overflow > 0; overflow -= 2) {
            int length = max_length - 1;
            while (with_length[length] == 0)
                length--;
            with_length[length]--;
            with_length[length + 1] += 2;
            with_length[max_length]--;
        }
        int next = 0; /* through the nodes in the order in which they left the heap */
        for (int length = max_length; length > 0; length--)
            for (int left = with_length[length]; left > 0;) {
                int node = child[next / 2][next % 2];
                next++;
                if (node < n) {
                    code->length[node] = (uint8_t)length;
                    left--;
                }
            }
    }
    int64_t bits = 0;
    for (int i = 0; i < n; i++)
        bits += (int64_t)code->frequency[i] * code->length[i];
    return bits;
}

/* A symbol that does not occur, for a code of fewer than two. */
static void add_unused(Code *code)
{
    while (code->symbols < 2) {
        int at = code->symbols++;
        unsigned symbol = at == 0 ? 0 : code->symbol[0] < 2 ? code->symbol[0] + 1u : 0;
        if (at == 1 && symbol < code->symbol[0]) { /* ascending */
            code->symbol[1] = code->symbol[0];
            code->frequency[1] = code->frequency[0];
            at = 0;
        }
        code->symbol[at] = (uint16_t)symbol;
        code->frequency[at] = 0;
    }
}

static inline void count_zeros(int run, uint16_t *frequency)
{
    for (; run >= 138; run -= 138)
        frequency[MANY_ZEROS]++;
    if (run < 3)
        frequency[0] += (uint16_t)run;
    else
        frequency[run <= 10 ? FEW_ZEROS : MANY_ZEROS]++;
}

static inline void count_run(int length, int run, uint16_t *frequency)
{
    if (run < 4) {
        frequency[length] += (uint16_t)run;
        return;
    }
    frequency[length]++;
    frequency[REPEAT]++;
    for (run -= 7; run > 0; run -= 6) {
        if (run < 3)
            frequency[length] += (uint16_t)run;
        else
            frequency[REPEAT]++;
    }
}

/* Count the symbols that say the code lengths: runs of equal ones, and of zeros, are said by their length. */
static void count_lengths(const Code *code, uint16_t *frequency)
{
    int next = 0;
    for (int i = 0; i < code->symbols;) {
        int first = code->symbol[i], length = code->length[i], run = 1;
        if (first > next)
            count_zeros(first - next, frequency);
        while (i + run < code->symbols && code->symbol[i + run] == first + run && code->length[i + run] == length)
            run++;
        count_run(length, run, frequency);
        next = first + run;
        i += run;
    }
}

/* The bits of the codes' description: counts, the lengths' own code, the lengths. */
static int64_t description_bits(const Code *literals, const Code *distances)
{
    static const uint8_t order[LENGTH_CODES] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint16_t frequency[LENGTH_CODES] = {0};
    uint8_t length_of[LENGTH_CODES] = {0};
    Code lengths;
    count_lengths(literals, frequency);
    count_lengths(distances, frequency);
    lengths.symbols = 0;
    for (int symbol = 0; symbol < LENGTH_CODES; symbol++)
        if (frequency[symbol]) {
            lengths.symbol[lengths.symbols] = (uint16_t)symbol;
            lengths.frequency[lengths.symbols++] = frequency[symbol];
        }
    add_unused(&lengths);
    int64_t bits = build_code(&lengths, 7);
    bits += 2 * frequency[REPEAT] + 3 * frequency[FEW_ZEROS] + 7 * frequency[MANY_ZEROS];
    for (int i = 0; i < lengths.symbols; i++)
        length_of[lengths.symbol[i]] = lengths.length[i];
    int said = LENGTH_CODES;
    while (said > 4 && length_of[order[said - 1]] == 0)
        said--;
    return bits + 3 * said + 5 + 5 + 4;
}

/* The position in the stream, in bits, behind a block that begins at `bits` and holds so many bytes uncompressed. */
static int64_t end_block(const Counts *counts, int64_t bytes, int64_t bits)
{
    Code literals, distances;
    int64_t fixed = 0, extra = 0;
    int n = 0;
    for (int word = 0; word < 5; word++)
        for (uint64_t used = counts->literal_used[word]; used; used &= used - 1) {
            int symbol = word * 64 + __builtin_ctzll(used);
            int frequency = counts->literal[symbol];
            literals.symbol[n] = (uint16_t)symbol;
            literals.frequency[n++] = (uint16_t)frequency;
            fixed += frequency * static_literal_bits[symbol];
            extra += frequency * extra_literal_bits[symbol];
        }
    literals.symbols = n;
    n = 0;
    for (uint64_t used = counts->distance_used; used; used &= used - 1) {
        int symbol = __builtin_ctzll(used);
        int frequency = counts->distance[symbol], more = symbol < 4 ? 0 : symbol / 2 - 1;
        distances.symbol[n] = (uint16_t)symbol;
        distances.frequency[n++] = (uint16_t)frequency;
        fixed += frequency * (5 + more);
        extra += frequency * more;
    }
    distances.symbols = n;
    add_unused(&literals);
    add_unused(&distances);
    int64_t dynamic = build_code(&literals, 15) + build_code(&distances, 15) + extra;
    dynamic += description_bits(&literals, &distances);
    int64_t fixed_bytes = (fixed + 3 + 7) >> 3, smallest = (dynamic + 3 + 7) >> 3;
    if (fixed_bytes <= smallest)
        smallest = fixed_bytes;
    if (bytes + 4 <= smallest)
        return ((bits + 3 + 7) & ~(int64_t)7) + 32 + 8 * bytes;
    return bits + 3 + (fixed_bytes == smallest ? fixed : dynamic);
}

#endif
