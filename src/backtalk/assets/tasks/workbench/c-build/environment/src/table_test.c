#include "table.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what) \
    if (!(what)) { \
        printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #what); \
        return 1; \
    }

int main(void) {
    struct table *table = table_new();
    CHECK(table_put(table, "one", "1"));
    CHECK(!table_put(table, "one", "uno"));
    CHECK(strcmp(table_get(table, "one"), "uno") == 0);
    CHECK(table_count(table) == 1);
    char key[16];
    for (int i = 0; i < 1000; i++) {
        snprintf(key, sizeof key, "key-%d", i);
        CHECK(table_put(table, key, key));
    }
    for (int i = 0; i < 1000; i += 2) {
        snprintf(key, sizeof key, "key-%d", i);
        CHECK(table_drop(table, key));
    }
    for (int i = 0; i < 1000; i++) {
        snprintf(key, sizeof key, "key-%d", i);
        CHECK(!table_get(table, key) == (i % 2 == 0));
    }
    table_free(table);
    puts("the table is right");
    return 0;
}
