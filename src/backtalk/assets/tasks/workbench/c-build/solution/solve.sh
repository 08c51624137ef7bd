#!/bin/bash
set -e
cd /home/agent/shelf
cat > Makefile <<'MAKE'
CC = gcc
CFLAGS = -std=c11 -O2 -Wall -Wextra -Werror

all: build/shelf

build:
	mkdir -p build

build/%.o: src/%.c src/table.h | build
	$(CC) $(CFLAGS) -c -o $@ $<

build/shelf: build/shelf.o build/table.o
	$(CC) $(CFLAGS) -o $@ $^

build/table_test: build/table.o build/table_test.o
	$(CC) $(CFLAGS) -o $@ $^

check: build/table_test
	build/table_test

clean:
	rm -rf build

.PHONY: all check clean
MAKE
sed -i 's/^#define TABEL_H/#define TABLE_H/; s/^#include <stdbool.h>/&\n#include <stddef.h>/' src/table.h
python3 - <<'PY'
def edit(path, *changes):
    with open(path) as file:
        text = file.read()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    with open(path, "w") as file:
        file.write(text)


edit(
    "src/table.c",
    ("#include <stdlib.h>\n", "#include <stdlib.h>\n#include <string.h>\n"),
    ("malloc(strlen(text))", "malloc(strlen(text) + 1)"),
    ("    size_t longest;\n", ""),
    ("    if (length > table->longest)\n        table->longest = length;\n", ""),
    ("    size_t length = strlen(value);\n", ""),
    ("int table_count", "size_t table_count"),
    ("    entry->key = entry->value = NULL;\n    table->count--;\n", """\
    entry->key = entry->value = NULL;
    table->count--;
    /* Those behind it, up to the next gap, are found from where they hash to: put each in again. */
    size_t mask = table->size - 1;
    for (size_t i = (entry - table->entries + 1) & mask; table->entries[i].key; i = (i + 1) & mask) {
        struct entry moved = table->entries[i];
        table->entries[i].key = table->entries[i].value = NULL;
        *find(table, moved.key) = moved;
    }
"""),
    ("    return table->longest;\n", """\
    size_t longest = 0;
    for (size_t i = 0; i < table->size; i++) {
        size_t length = table->entries[i].key ? strlen(table->entries[i].value) : 0;
        longest = length > longest ? length : longest;
    }
    return longest;
"""),
)
edit(
    "src/shelf.c",
    ("#define _POSIX_C_SOURCE 200809L", "#define _DEFAULT_SOURCE"),
    ("    char line[256];\n    while (fgets(line, sizeof line, stdin)) {\n",
     "    char *line = NULL;\n    size_t size = 0;\n    while (getline(&line, &size, stdin) > 0) {\n"),
    ("    table_free(table);\n    return 0;", "    free(line);\n    table_free(table);\n    return 0;"),
)
PY
make -s
make -s check
