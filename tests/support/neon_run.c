/* Runs a format's kernels on ARM: argv: rows, columns, bytes of weights, bytes of a q8 row, tokens. stdin: weights, then
   q8 rows. stdout: float32 (tokens, rows) of gemv, the same of gemv_batch. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void gemv(int64_t w, int64_t n_rows, int64_t n_cols, int64_t q8, int64_t out);
void gemv_batch(int64_t w, int64_t n_rows, int64_t n_cols, int64_t q8_rows, int64_t outs, int64_t offset, int64_t n);

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    int64_t n[5], q8_rows[8], outs[8];
    for (int i = 0; i < 5; i++) n[i] = atoll(argv[i + 1]);
    int64_t rows = n[0], cols = n[1], tokens = n[4];
    char *w = aligned_alloc(4096, n[2]), *q8 = aligned_alloc(4096, n[3] * tokens);
    float *out = calloc(2 * tokens * rows, sizeof *out);
    if (fread(w, 1, n[2], stdin) != (size_t)n[2] || fread(q8, n[3], tokens, stdin) != (size_t)tokens) return 3;
    for (int64_t t = 0; t < tokens; t++) {
        q8_rows[t] = (int64_t)(q8 + n[3] * t);
        outs[t] = (int64_t)(out + (tokens + t) * rows);
        gemv((int64_t)w, rows, cols, q8_rows[t], (int64_t)(out + t * rows));
    }
    gemv_batch((int64_t)w, rows, cols, (int64_t)q8_rows, (int64_t)outs, 0, tokens);
    return fwrite(out, sizeof *out, 2 * tokens * rows, stdout) != (size_t)(2 * tokens * rows);
}
