/* Puts, gets and drops at random, beside a plain list of what has to be there. Linked with --wrap for each allocation:
   blocks are guarded behind their end, and what was given back is overwritten and never given out again. */
#include "table.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEYS 300
#define GUARD 32
#define LIVE 0x5ca1ab1e0ddba11ull
#define GONE 0xdeadfa11c0ffeeull

static void fail(const char *what) {
    printf("judge: %s\n", what);
    fflush(stdout);
    _Exit(1);
}

struct head {
    uint64_t state;
    size_t size;
};

void *__real_malloc(size_t size);
void __real_free(void *block);
static long blocks;

void *__wrap_malloc(size_t size) {
    struct head *head = __real_malloc(sizeof *head + size + GUARD);
    if (!head)
        fail("out of memory");
    *head = (struct head){LIVE, size};
    memset(head + 1, 0xa5, size);
    memset((char *)(head + 1) + size, 0x5a, GUARD);
    blocks++;
    return head + 1;
}

void __wrap_free(void *block) {
    if (!block)
        return;
    struct head *head = (struct head *)block - 1;
    if (head->state == GONE)
        fail("a block was given back twice");
    if (head->state != LIVE)
        fail("what was given back is no block, or was written in front of its begin");
    for (int i = 0; i < GUARD; i++)
        if (((char *)block)[head->size + i] != 0x5a)
            fail("a block was written past its end");
    head->state = GONE;
    memset(block, 0xdd, head->size);
    blocks--;
}

void *__wrap_calloc(size_t count, size_t size) {
    void *block = __wrap_malloc(count * size);
    return memset(block, 0, count * size);
}

void *__wrap_realloc(void *old, size_t size) {
    void *block = __wrap_malloc(size);
    if (old) {
        size_t before = ((struct head *)old - 1)->size;
        memcpy(block, old, before < size ? before : size);
        __wrap_free(old);
    }
    return block;
}

char *__wrap_strndup(const char *text, size_t most) {
    size_t length = 0;
    while (length < most && text[length])
        length++;
    char *block = __wrap_malloc(length + 1);
    memcpy(block, text, length);
    block[length] = '\0';
    return block;
}

char *__wrap_strdup(const char *text) { return __wrap_strndup(text, strlen(text)); }

static uint64_t seed = 88172645463325252ull;

static unsigned number(unsigned below) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return (seed >> 33) % below;
}

/* What has to be there: the length of the value of each key, -1 where it is not. Values are one letter many times. */
static int lengths[KEYS];
static char letters[KEYS];

static void look(const struct table *table, unsigned i, const char *key) {
    const char *value = table_get(table, key);
    if (!value != (lengths[i] < 0))
        fail("table_get of a key that is not there, or nothing for one that is");
    for (int at = 0; value && at <= lengths[i]; at++)
        if (value[at] != (at < lengths[i] ? letters[i] : '\0'))
            fail("table_get gave another value than was put");
}

static void round_of(unsigned steps, unsigned keys, unsigned longest) {
    struct table *table = table_new();
    static char value[4000], key[32];
    for (unsigned i = 0; i < KEYS; i++)
        lengths[i] = -1;
    for (unsigned step = 0; step < steps; step++) {
        unsigned i = number(keys), what = number(10);
        snprintf(key, sizeof key, "k%u", i);
        if (what < 5) {
            int length = number(number(8) ? 12 : longest);
            memset(value, 'a' + number(26), length);
            value[length] = '\0';
            if (table_put(table, key, value) != (lengths[i] < 0))
                fail("table_put said of a new key that it was there, or the other way round");
            lengths[i] = length;
            letters[i] = value[0];
            memset(value, '#', length);
            memset(key, '#', 2);
            snprintf(key, sizeof key, "k%u", i);
        } else if (what < 9) {
            if (table_drop(table, key) != (lengths[i] >= 0))
                fail("table_drop said of a key that it was there, or the other way round");
            lengths[i] = -1;
        }
        look(table, i, key);
        size_t count = 0, most = 0;
        for (unsigned at = 0; at < keys; at++) {
            count += lengths[at] >= 0;
            most = lengths[at] > (int)most ? (size_t)lengths[at] : most;
        }
        if (table_count(table) != count)
            fail("table_count");
        if (table_longest(table) != most)
            fail("table_longest");
        for (unsigned at = 0; step % 50 == 0 && at < keys; at++) {
            snprintf(key, sizeof key, "k%u", at);
            look(table, at, key);
        }
    }
    table_free(table);
    if (blocks)
        fail("table_free left something");
}

int main(void) {
    round_of(4000, KEYS, 3000);
    round_of(4000, 11, 50);
    round_of(2000, 12, 3000);
    round_of(3000, 40, 20);
    puts("judged");
    return 0;
}
