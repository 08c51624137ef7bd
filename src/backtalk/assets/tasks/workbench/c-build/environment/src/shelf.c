#define _POSIX_C_SOURCE 200809L
#include "table.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void answer(struct table *table, char *line) {
    char *rest = line;
    char *command = strsep(&rest, " ");
    char *key = rest ? strsep(&rest, " ") : NULL;
    if (key && *key && rest && strcmp(command, "put") == 0)
        puts(table_put(table, key, rest) ? "new" : "replaced");
    else if (key && *key && !rest && strcmp(command, "get") == 0) {
        const char *value = table_get(table, key);
        puts(value ? value : "nothing");
    } else if (key && *key && !rest && strcmp(command, "drop") == 0)
        puts(table_drop(table, key) ? "dropped" : "nothing");
    else if (!key && strcmp(command, "count") == 0)
        printf("%zu\n", table_count(table));
    else if (!key && strcmp(command, "longest") == 0)
        printf("%zu\n", table_longest(table));
    else
        puts("what?");
}

int main(void) {
    struct table *table = table_new();
    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = '\0';
        answer(table, line);
    }
    table_free(table);
    return 0;
}
