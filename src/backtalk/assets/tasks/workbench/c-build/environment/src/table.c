#include "table.h"

#include <stdint.h>
#include <stdlib.h>

struct entry {
    char *key; /* NULL: free */
    char *value;
};

struct table {
    struct entry *entries;
    size_t size; /* a power of two */
    size_t count;
    size_t longest;
};

static uint32_t hash(const char *key) {
    uint32_t h = 2166136261u;
    while (*key)
        h = (h ^ (unsigned char)*key++) * 16777619u;
    return h;
}

static char *copy(const char *text) {
    char *new = malloc(strlen(text));
    if (!new)
        abort();
    return strcpy(new, text);
}

struct table *table_new(void) {
    struct table *table = calloc(1, sizeof *table);
    if (!table)
        abort();
    table->size = 16;
    table->entries = calloc(table->size, sizeof *table->entries);
    if (!table->entries)
        abort();
    return table;
}

void table_free(struct table *table) {
    for (size_t i = 0; i < table->size; i++) {
        free(table->entries[i].key);
        free(table->entries[i].value);
    }
    free(table->entries);
    free(table);
}

/* Where key is, or where it would go. */
static struct entry *find(const struct table *table, const char *key) {
    size_t i = hash(key) & (table->size - 1);
    while (table->entries[i].key && strcmp(table->entries[i].key, key) != 0)
        i = (i + 1) & (table->size - 1);
    return &table->entries[i];
}

static void grow(struct table *table) {
    struct entry *old = table->entries;
    table->size *= 2;
    table->entries = calloc(table->size, sizeof *table->entries);
    if (!table->entries)
        abort();
    for (size_t i = 0; i < table->size / 2; i++)
        if (old[i].key)
            *find(table, old[i].key) = old[i];
    free(old);
}

bool table_put(struct table *table, const char *key, const char *value) {
    size_t length = strlen(value);
    if (length > table->longest)
        table->longest = length;
    struct entry *entry = find(table, key);
    if (entry->key) {
        free(entry->value);
        entry->value = copy(value);
        return false;
    }
    entry->key = copy(key);
    entry->value = copy(value);
    table->count++;
    if (table->count * 4 > table->size * 3)
        grow(table);
    return true;
}

const char *table_get(const struct table *table, const char *key) {
    return find(table, key)->value;
}

bool table_drop(struct table *table, const char *key) {
    struct entry *entry = find(table, key);
    if (!entry->key)
        return false;
    free(entry->key);
    free(entry->value);
    entry->key = entry->value = NULL;
    table->count--;
    return true;
}

int table_count(const struct table *table) {
    return table->count;
}

size_t table_longest(const struct table *table) {
    return table->longest;
}
