/* zlib's search for repeats, on a source that is primed once and targets that follow it.

   Positions count from the source's first byte. deflate moves its window by WINDOW bytes at a time; all that is left
   of that here is `base`, the position of the window's first byte, which no match can begin at. */
#ifndef HARNESS_MATCHING_H
#define HARNESS_MATCHING_H

#include "huffman.h"

enum {
    HASH_SIZE = 1 << 15, /* memLevel 8 */
    WINDOW = 1 << 15,
    MIN_LOOKAHEAD = MAX_MATCH + MIN_MATCH + 1,
    MAX_DISTANCE = WINDOW - MIN_LOOKAHEAD,
    SLIDE = WINDOW + MAX_DISTANCE, /* how far into the window a position moves it */
    TOO_FAR = 4096,                /* a repeat of three bytes from further back costs more than it saves */
    PADDING = 2 * MAX_MATCH + 16   /* bytes behind a text that a comparison may read */
};

typedef struct {
    int good, lazy, nice, chain;
    int deferred; /* a repeat is kept back until the next position has been looked at */
} Level;

static const Level LEVELS[10] = {
    {0, 0, 0, 0, 0},     {4, 4, 8, 4, 0},      {4, 5, 16, 8, 0},      {4, 6, 32, 32, 0},      {4, 4, 16, 16, 1},
    {8, 16, 32, 32, 1},  {8, 16, 128, 128, 1}, {8, 32, 128, 256, 1},  {32, 128, 258, 1024, 1}, {32, 258, 258, 4096, 1},
};

typedef struct {
    int32_t last;  /* the last position with this hash, -1 for none */
    int32_t count; /* how many there are */
} Chain;

/* What is known of a target's position whatever comes before the target. */
typedef struct {
    uint16_t hash;
    uint16_t previous; /* distance to the last position of the target with this hash, 0 for none within the window */
    uint16_t depth;    /* how many positions of the target before this one have it */
    uint16_t length;   /* of the longest repeat of the target's own bytes, 0 for none */
    uint16_t distance; /* of that */
} Site;

typedef struct {
    int32_t position, block_start, base;
    int32_t match_length, match_start; /* at the position before: the repeat that was kept back */
    int32_t pending;                   /* whether the byte before has yet to be counted */
    int64_t bits;                      /* of the blocks that have ended */
    Counts counts;
} State;

typedef struct {
    const Level *level;
    uint8_t *text; /* the source, behind it the target of the moment */
    int32_t source_length, length;
    const Site *sites; /* the target's; NULL where it is too long for them */
    Chain chains[HASH_SIZE];
    int32_t previous[WINDOW]; /* of each position modulo WINDOW: the position before with the same hash, or -1 */
} Search;

static inline unsigned hash_at(const uint8_t *p)
{
    return ((unsigned)p[0] << 10 ^ (unsigned)p[1] << 5 ^ p[2]) & (HASH_SIZE - 1);
}

static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

static inline unsigned pair_at(const uint8_t *p)
{
    uint16_t pair;
    memcpy(&pair, p, 2);
    return pair;
}

/* How many of the first `limit` bytes are equal. */
static inline int32_t common(const uint8_t *a, const uint8_t *b, int32_t limit)
{
    int32_t n = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; n < limit; n += 8) {
        uint64_t x, y;
        memcpy(&x, a + n, 8);
        memcpy(&y, b + n, 8);
        if (x != y)
            return smaller(n + (__builtin_ctzll(x ^ y) >> 3), limit);
    }
    return limit;
#else
    while (n < limit && a[n] == b[n])
        n++;
    return n;
#endif
}

static void clear_chains(Search *search)
{
    for (int i = 0; i < HASH_SIZE; i++) {
        search->chains[i].last = -1;
        search->chains[i].count = 0;
    }
}

/* Append a position to its hash's chain. */
static inline void enter(Search *search, int32_t position)
{
    Chain *chain = &search->chains[hash_at(search->text + position)];
    search->previous[position % WINDOW] = chain->last;
    chain->last = position;
    chain->count++;
}

/* Take the position that was entered last out again. */
static inline void leave(Search *search, int32_t position)
{
    Chain *chain = &search->chains[hash_at(search->text + position)];
    chain->last = search->previous[position % WINDOW];
    chain->count--;
}

/* The last position before this one with its hash; this one has been entered unless it has a site. */
static inline int32_t position_before(const Search *search, int32_t position)
{
    int32_t i = position - search->source_length;
    if (i < 0 || !search->sites)
        return search->previous[position % WINDOW];
    const Site *site = &search->sites[i];
    return site->previous ? position - site->previous : search->chains[site->hash].last;
}

/* The longest repeat at a position, the nearest of equals, of more than `best` bytes: its length (else `best`), and
   its start. Walks the chain as zlib does. */
static int32_t walk(const Search *search, int32_t base, int32_t position, int32_t best, int32_t *start)
{
    const uint8_t *text = search->text, *here = text + position;
    int32_t limit = larger(position - MAX_DISTANCE, base), cap = smaller(MAX_MATCH, search->length - position);
    int32_t nice = smaller(search->level->nice, cap);
    int steps = best >= search->level->good ? search->level->chain >> 2 : search->level->chain;
    int32_t candidate = position_before(search, position);
    if (candidate <= base || position - candidate > MAX_DISTANCE)
        return best;
    unsigned end = pair_at(here + best - 1);
    do {
        if (pair_at(text + candidate + best - 1) != end)
            continue;
        int32_t length = common(text + candidate, here, cap);
        if (length > best) {
            best = length;
            *start = candidate;
            if (best >= nice)
                break;
            end = pair_at(here + best - 1);
        }
    } while ((candidate = position_before(search, candidate)) > limit && --steps > 0);
    return best;
}

/* The same at a target's position, by what its site knows: a repeat of more than `best` bytes must hold the three
   bytes that end it, so the source's positions with those are looked through where they are fewer. */
static int32_t find(const Search *search, int32_t base, int32_t position, int32_t best, int32_t *start)
{
    int32_t source_length = search->source_length, i = position - source_length;
    if (i < 0 || !search->sites)
        return walk(search, base, position, best, start);
    const Site *site = &search->sites[i];
    const Chain *chain = &search->chains[site->hash];
    int32_t count = chain->count;
    int steps = best >= search->level->good ? search->level->chain >> 2 : search->level->chain;
    if (site->depth + count > steps) /* zlib may give up early */
        return walk(search, base, position, best, start);
    int32_t limit = larger(position - MAX_DISTANCE, base), cap = smaller(MAX_MATCH, search->length - position);
    int32_t nice = smaller(search->level->nice, cap);
    if (site->length > best) {
        best = site->length;
        *start = position - site->distance;
        if (best >= nice)
            return best;
    }
    if (count == 0 || best >= cap)
        return best;
    if (!site->previous && position - chain->last == MAX_DISTANCE) /* as far as only the first may be */
        return walk(search, base, position, best, start);
    const uint8_t *text = search->text, *here = text + position;
    int32_t offset = 0, remaining = count, candidate = chain->last;
    for (;;) {
        /* Every candidate of this chain, from the nearest. A longer repeat may show that another chain is shorter. */
        int32_t shorter = -1;
        if (best > 2 && search->sites[i + best - 2].hash != site->hash) {
            const Chain *other = &search->chains[search->sites[i + best - 2].hash];
            if (other->count < remaining) {
                shorter = best - 2;
                /* Candidates so near the source's end that those three bytes lie in the target. */
                int32_t near = chain->last;
                for (; near >= source_length - shorter && near > limit; near = search->previous[near % WINDOW]) {
                    int32_t length = common(text + near, here, cap);
                    if (length > best) {
                        best = length;
                        *start = near;
                        if (best >= nice)
                            return best;
                    }
                }
                offset = shorter;
                remaining = other->count;
                candidate = other->last;
            }
        }
        int32_t before = best;
        for (; remaining > 0; candidate = search->previous[candidate % WINDOW]) {
            remaining--;
            int32_t from = candidate - offset;
            if (from <= limit)
                return best;
            int32_t length = common(text + from, here, cap);
            if (length > best) {
                best = length;
                *start = from;
                if (best >= nice)
                    return best;
                candidate = search->previous[candidate % WINDOW];
                break;
            }
        }
        if (best == before)
            return best;
    }
}

#endif
