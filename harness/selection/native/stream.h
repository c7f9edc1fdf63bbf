/* The course of one stream: the source once, as far as no target can change it, then each target from there. */
#ifndef HARNESS_STREAM_H
#define HARNESS_STREAM_H

#include "matching.h"

enum { GZIP_BYTES = 18, LONGEST_WITH_SITES = 32000 };

typedef struct {
    int32_t position, overwritten; /* what was entered, and what `previous` held in its place */
} Entry;

typedef struct {
    Search search;
    State primed;
    Entry *entries; /* those of the target of the moment; NULL while the source is primed */
    int32_t entered;
    int32_t next_to_enter;
} Work;

static inline void enter_logged(Work *work, int32_t position)
{
    if (work->entries) {
        Entry *entry = &work->entries[work->entered++];
        entry->position = position;
        entry->overwritten = work->search.previous[position % WINDOW];
    }
    enter(&work->search, position);
}

static void leave_all(Work *work)
{
    while (work->entered > 0) {
        const Entry *entry = &work->entries[--work->entered];
        leave(&work->search, entry->position);
        work->search.previous[entry->position % WINDOW] = entry->overwritten;
    }
}

static inline void enter_through(Work *work, int32_t position)
{
    int32_t last = smaller(position, work->search.length - MIN_MATCH);
    while (work->next_to_enter <= last)
        enter_logged(work, work->next_to_enter++);
}

/* zlib moves its window when it wants more input: with less than MIN_LOOKAHEAD bytes left in it. At the input's end
   it wants more at every position, hence a byte earlier. */
static inline int slides(const State *state, int32_t left)
{
    int32_t at = state->position - state->base;
    return at > SLIDE || (at == SLIDE && left < MIN_LOOKAHEAD);
}

/* Whether what happens at a position could depend on bytes behind the source, unless a repeat reaches its end. */
static inline int needs_target(const State *state, int32_t left)
{
    return left < MIN_MATCH || (left < MIN_LOOKAHEAD && state->position - state->base == SLIDE);
}

/* zlib cannot store a block whose beginning has left its window. That takes more than 32,507 bytes in 16,383 symbols:
   half of them repeats, which cost less than their bytes by more than any literal costs in excess, so that storing is
   never the smallest form there and needs no thought here. */
static void flush(State *state)
{
    state->bits = end_block(&state->counts, state->position - state->block_start, state->bits);
    state->block_start = state->position;
    begin_block(&state->counts);
}

/* Levels 4 to 9: a repeat is taken unless the next position has a longer one. Stops before what a target could
   change if `priming`, else behind the last byte. */
static inline void run_deferred(Work *work, State *restrict state, int priming)
{
    const Search *search = &work->search;
    const uint8_t *text = search->text;
    const int32_t length = search->length;
    for (int32_t left; (left = length - state->position) > 0;) {
        if (priming && needs_target(state, left))
            break;
        if (slides(state, left))
            state->base += WINDOW;
        int32_t position = state->position, kept = state->match_length, kept_start = state->match_start;
        int32_t found = MIN_MATCH - 1;
        if (work->next_to_enter <= position)
            enter_through(work, position);
        /* The chains do not fit into the nearest cache: fetch one that will be wanted soon. */
        if (!priming && search->sites && position >= search->source_length && left > 8)
            __builtin_prefetch(&search->chains[search->sites[position - search->source_length + 6].hash]);
        if (left >= MIN_MATCH && kept < search->level->lazy) {
            found = priming ? walk(search, state->base, position, kept, &state->match_start)
                            : find(search, state->base, position, kept, &state->match_start);
            if (priming && found >= left) {
                state->match_start = kept_start;
                break;
            }
            if (found == MIN_MATCH && position - state->match_start > TOO_FAR)
                found = MIN_MATCH - 1;
        }
        if (kept >= MIN_MATCH && found <= kept) {
            count_match(&state->counts, kept, position - 1 - kept_start);
            state->position = position + kept - 1;
            state->pending = 0;
            state->match_length = MIN_MATCH - 1;
            if (state->counts.symbols == BLOCK_SYMBOLS)
                flush(state);
            continue;
        }
        if (state->pending) {
            count_literal(&state->counts, text[position - 1]);
            if (state->counts.symbols == BLOCK_SYMBOLS)
                flush(state);
        }
        state->pending = 1;
        state->match_length = found;
        state->position = position + 1;
    }
}

/* Levels 1 to 3: the first repeat is taken; the positions within a long one are not searched for later ones. */
static inline void run_eager(Work *work, State *restrict state, int priming)
{
    const Search *search = &work->search;
    const uint8_t *text = search->text;
    const int32_t length = search->length;
    for (int32_t left; (left = length - state->position) > 0;) {
        if (priming && needs_target(state, left))
            break;
        int32_t position = state->position, found = MIN_MATCH - 1, start = 0;
        if (slides(state, left))
            state->base += WINDOW;
        if (left >= MIN_MATCH) {
            if (work->next_to_enter <= position)
                enter_through(work, position);
            found = walk(search, state->base, position, found, &start);
            if (priming && found + MIN_MATCH > left)
                break;
        }
        if (found >= MIN_MATCH) {
            count_match(&state->counts, found, position - start);
            state->position = position + found;
            if (found <= search->level->lazy && left - found >= MIN_MATCH)
                enter_through(work, state->position - 1);
        } else {
            count_literal(&state->counts, text[position]);
            state->position = position + 1;
        }
        work->next_to_enter = state->position;
        if (state->counts.symbols == BLOCK_SYMBOLS)
            flush(state);
    }
}

/* The whole stream's length in bytes, from a state behind the last byte. */
static int64_t finish(State *state, const uint8_t *text)
{
    if (state->pending)
        count_literal(&state->counts, text[state->position - 1]);
    flush(state);
    return GZIP_BYTES + (state->bits + 7) / 8;
}

/* Empty the chains. Of a short text, only those that it entered anything in: to write all of them takes longer than to
   compress it. */
static void forget_source(Work *work)
{
    Search *search = &work->search;
    if (work->next_to_enter > HASH_SIZE / 8) {
        clear_chains(search);
        return;
    }
    for (int32_t i = 0; i < work->next_to_enter; i++)
        search->chains[hash_at(search->text + i)] = (Chain){-1, 0};
}

/* Bring the source into `work->search.text` (room for it, the longest target and PADDING) and compress it as far as
   no target can change what is done. */
static void prime(Work *work, const Level *level, const uint8_t *source, int32_t length)
{
    Search *search = &work->search;
    forget_source(work);
    search->level = level;
    search->source_length = search->length = length;
    search->sites = NULL;
    memcpy(search->text, source, (size_t)length);
    memset(search->text + length, 0, PADDING);
    work->next_to_enter = 0;
    State *state = &work->primed;
    memset(state, 0, sizeof *state);
    state->match_length = MIN_MATCH - 1;
    begin_block(&state->counts);
    Entry *entries = work->entries;
    work->entries = NULL;
    if (level->deferred) {
        run_deferred(work, state, 1);
        enter_through(work, length);
    } else {
        run_eager(work, state, 1);
    }
    work->entries = entries;
}

/* C(source ⊕ target); everything is as before afterwards. */
static int64_t size_with(Work *work, const uint8_t *target, int32_t length, const Site *sites)
{
    Search *search = &work->search;
    State state = work->primed;
    int32_t next_to_enter = work->next_to_enter;
    memcpy(search->text + search->source_length, target, (size_t)length);
    search->length = search->source_length + length;
    if (search->level->deferred) {
        search->sites = sites;
        if (sites) { /* the positions whose three bytes are the source's and the target's */
            enter_through(work, search->source_length - 1);
            work->next_to_enter = INT32_MAX;
        }
        run_deferred(work, &state, 0);
    } else {
        run_eager(work, &state, 0);
    }
    leave_all(work);
    work->next_to_enter = next_to_enter;
    return finish(&state, search->text);
}

/* Fill a target's sites; `work` is a free one with room for the target. */
static void survey(Work *work, const Level *level, const uint8_t *target, int32_t length, Site *sites)
{
    Search *search = &work->search;
    search->level = level;
    search->source_length = search->length = length;
    search->sites = NULL;
    memcpy(search->text, target, (size_t)length);
    memset(search->text + length, 0, PADDING);
    for (int32_t i = 0; i < length; i++) {
        Site *site = &sites[i];
        memset(site, 0, sizeof *site);
        if (i + MIN_MATCH > length)
            continue;
        site->hash = (uint16_t)hash_at(search->text + i);
        site->depth = (uint16_t)search->chains[site->hash].count;
        int32_t last = search->chains[site->hash].last, start = 0;
        site->previous = (uint16_t)(last < 0 ? 0 : i - last);
        enter(search, i);
        int32_t found = walk(search, -1, i, MIN_MATCH - 1, &start);
        if (found >= MIN_MATCH) {
            site->length = (uint16_t)found;
            site->distance = (uint16_t)(i - start);
        }
    }
    for (int32_t i = length - MIN_MATCH; i >= 0; i--)
        leave(search, i);
}

#endif
