/* The moving gradient on (C,)-vectors, around the backward of native.c: `Moving.part` of moving.py. */

#ifndef A

#include <math.h>
#include <stdint.h>
#include <string.h>

/* native.py packs it. */
struct moving {
    const void *vectors; /* (5, G, C): mean, var, std, scale, shift */
    void *mean, *slope;  /* (C,), the layer's */
    const void *sigma;   /* (C,), that r was computed from */
    int64_t G, C, size;  /* size: of a number, 4 or 8 bytes */
    int64_t all, each;   /* values of a channel in all groups, and in one; the last may have fewer */
    double own, eps, rate;
};

#define A float
#define NAME(f) f##_f32
#include "moving.c" /* the second part, for each type */
#undef A
#undef NAME

#define A double
#define NAME(f) f##_f64
#include "moving.c"

int brn_size_of_moving(void) { return (int)sizeof(struct moving); }

/* Of channels c0 to c1 of group g: what there is to be added to `own` times the means of dy and of dy * x_hat, and the
 * factor of dy. */
void brn_given(const void *packed, int64_t g, int64_t c0, int64_t c1, void *of_dy, void *of_dy_x_hat, void *factor)
{
    struct moving m;
    memcpy(&m, packed, sizeof m);
    if (m.size == sizeof(float))
        given_f32(&m, g, c0, c1, of_dy, of_dy_x_hat, factor);
    else
        given_f64(&m, g, c0, c1, of_dy, of_dy_x_hat, factor);
}

/* The move of mean and slope by what they leave of dy; from the C sums of dy of each group, and behind them those of
 * dy * x_hat. */
void brn_move_gradient(const void *packed, const double *sums, int64_t stride)
{
    struct moving m;
    memcpy(&m, packed, sizeof m);
    if (m.size == sizeof(float))
        move_f32(&m, sums, stride);
    else
        move_f64(&m, sums, stride);
}

#else

static void NAME(given)(const struct moving *m, int64_t g, int64_t c0, int64_t c1, A *restrict of_dy,
                        A *restrict of_dy_x_hat, A *restrict factor)
{
    const A *restrict std = (const A *)m->vectors + (2 * m->G + g) * m->C + c0, *restrict scale = std + m->G * m->C;
    const A *restrict shift = scale + m->G * m->C, *restrict sigma = (const A *)m->sigma + c0;
    const A *restrict mean = (const A *)m->mean + c0, *restrict slope = (const A *)m->slope + c0;
    A own = (A)m->own, rest = (A)(1 - m->own);
    for (int64_t c = 0; c < c1 - c0; c++) {
        A limited = std[c] / (scale[c] * sigma[c]);
        factor[c] = rest * (limited < 1 ? limited : 1);
    }
    for (int64_t c = 0; c < c1 - c0; c++)
        of_dy[c] = factor[c] * (mean[c] + shift[c] * slope[c]);
    for (int64_t c = 0; c < c1 - c0; c++)
        of_dy_x_hat[c] = factor[c] * (scale[c] * slope[c]);
    for (int64_t c = 0; c < c1 - c0; c++)
        factor[c] += own;
}

static void NAME(move)(const struct moving *m, const double *sums, int64_t stride)
{
    enum { SOME = 64 };
    A eps = (A)m->eps;
    for (int64_t first = 0; first < m->C; first += SOME) {
        int64_t n = m->C - first < SOME ? m->C - first : SOME;
        A *mean = (A *)m->mean + first, *slope = (A *)m->slope + first;
        A means[SOME] = {0}, slopes[SOME] = {0};
        double left[SOME] = {0}, left_h[SOME] = {0}, squares[SOME] = {0};
        memcpy(means, mean, (size_t)n * sizeof(A));
        memcpy(slopes, slope, (size_t)n * sizeof(A));
        for (int64_t g = 0; g < m->G; g++) {
            A count = (A)(g < m->G - 1 ? m->each : m->all - g * m->each);
            const A *restrict std = (const A *)m->vectors + (2 * m->G + g) * m->C + first;
            const A *restrict r = std + m->G * m->C, *restrict d = r + m->G * m->C;
            const double *restrict dy = sums + g * stride + first, *restrict dy_x_hat = dy + m->C;
            for (int64_t c = 0; c < n; c++) {
                /* x_hat has mean 0 and mean square var / (var + eps). */
                A square = count * (r[c] * r[c] * (1 - eps / (std[c] * std[c])) + d[c] * d[c]);
                A off = (A)dy[c] - count * means[c];
                left[c] += (double)(off - count * d[c] * slopes[c]);
                left_h[c] += (double)(r[c] * (A)dy_x_hat[c] + d[c] * off - square * slopes[c]);
                squares[c] += (double)square;
            }
        }
        double all = (double)m->all;
        for (int64_t c = 0; c < n; c++) {
            A new_mean = means[c] + (A)(m->rate * left[c] / all);
            A new_slope = slopes[c] + (A)(m->rate * left_h[c] / (squares[c] > all ? squares[c] : all));
            /* An overflow must not poison what the next steps subtract: a gradient scaler will skip this one. */
            int finite = isfinite(new_mean) && isfinite(new_slope);
            mean[c] = finite ? new_mean : means[c];
            slope[c] = finite ? new_slope : slopes[c];
        }
    }
}

#endif
