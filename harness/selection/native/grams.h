/* Which runs of four bytes a text has, by a hash of 16 bits: how many different ones, and what they weigh. */
#ifndef HARNESS_GRAMS_H
#define HARNESS_GRAMS_H

#include <stdint.h>
#include <string.h>

enum { GRAM_BYTES = 4, GRAM_HASHES = 1 << 16 };

static inline uint32_t gram_hash(const uint8_t *p)
{
    uint32_t gram = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    return gram * 0x9E3779B1u >> 16;
}

/* The number of different hashes, and into `weight` the sum of their weights. */
static int64_t count_grams(const uint16_t *weights, const uint8_t *text, int64_t length, int64_t *weight)
{
    uint64_t seen[GRAM_HASHES / 64]; /* small enough for the nearest cache */
    int64_t different = 0, sum = 0;
    memset(seen, 0, sizeof seen);
    for (int64_t i = 0; i + GRAM_BYTES <= length; i++) {
        uint32_t hash = gram_hash(text + i);
        uint64_t word = seen[hash / 64], bit = (uint64_t)1 << (hash % 64);
        int fresh = (word & bit) == 0; /* no branch: nothing predicts it */
        seen[hash / 64] = word | bit;
        different += fresh;
        sum += weights[hash] & -fresh;
    }
    *weight = sum;
    return different;
}

#endif
