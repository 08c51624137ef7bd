/* Texts by key. Both are copied: the caller keeps what it passed. */
#ifndef TABLE_H
#define TABEL_H

#include <stdbool.h>

struct table;

/* An empty table; table_free gives back all that it holds. */
struct table *table_new(void);
void table_free(struct table *table);

/* Hold value under key; true if the key was not there before, else its old value is replaced. */
bool table_put(struct table *table, const char *key, const char *value);

/* The value under key, or NULL. It is the table's own, good until the key is put or dropped. */
const char *table_get(const struct table *table, const char *key);

/* Forget key; true if it was there. */
bool table_drop(struct table *table, const char *key);

/* How many keys there are. */
size_t table_count(const struct table *table);

/* The length of the longest value that is in the table now, 0 where it is empty. */
size_t table_longest(const struct table *table);

#endif
