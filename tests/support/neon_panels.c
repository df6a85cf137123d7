/* Runs a format's repacking and its micro-kernel on ARM: argv: bytes of a row, blocks of a row, k-blocks, bytes of a
   k-block of 16 rows, bytes of a token panel, tokens. stdin: 32 rows, then the token panel. stdout: float32 (tokens, 32)
   sums. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void repack(int64_t rows, int64_t n_blocks, int64_t out);
void tile(int64_t weights, int64_t tokens, int64_t sums, int64_t n_k_blocks, int64_t n_tokens);

int main(int argc, char **argv) {
    if (argc != 8) return 2;
    int64_t n[7], addresses[16];
    for (int i = 0; i < 7; i++) n[i] = atoll(argv[i + 1]);
    int64_t row_bytes = n[0], n_blocks = n[1], n_k_blocks = n[2], part_bytes = n[3], tokens = n[5], ahead = n[6];
    char *rows = aligned_alloc(4096, 1 << 20), *panel = aligned_alloc(4096, 1 << 20), *x = aligned_alloc(4096, 1 << 20);
    float *sums = calloc(32 * tokens, sizeof *sums);
    if (fread(rows, row_bytes, 32, stdin) != 32 || fread(x, n[4], 1, stdin) != 1) return 3;
    for (int part = 0; part < 2; part++) {
        for (int r = 0; r < 16; r++) addresses[r] = (int64_t)(rows + row_bytes * (16 * part + r));
        repack((int64_t)addresses, n_blocks, (int64_t)(panel + part_bytes * part));
    }
    *(int64_t *)(panel + ahead) = (int64_t)x; /* what to fetch, and no lines of it */
    *(int64_t *)(panel + ahead + 8) = 0;
    tile((int64_t)panel, (int64_t)x, (int64_t)sums, n_k_blocks, tokens);
    return fwrite(sums, sizeof *sums, 32 * tokens, stdout) != (size_t)(32 * tokens);
}
