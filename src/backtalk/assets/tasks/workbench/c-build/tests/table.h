#ifndef TABLE_H
#define TABLE_H

#include <stdbool.h>
#include <stddef.h>

struct table;

struct table *table_new(void);
void table_free(struct table *table);
bool table_put(struct table *table, const char *key, const char *value);
const char *table_get(const struct table *table, const char *key);
bool table_drop(struct table *table, const char *key);
size_t table_count(const struct table *table);
size_t table_longest(const struct table *table);

#endif
