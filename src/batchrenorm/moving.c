/* The moving gradient on (C,)-vectors, around the backward of native.c: `Moving.part` of moving.py. */

#ifndef A

#include <math.h>
#include <stdint.h>
#include <string.h>

/* native.py packs it. */
struct moving {
    const void *vectors; /* (5, G, C): mean, var, std, scale, shift */
    void *mean, *slope;  /* (C,), the layer's */
    void *means;         /* (4, G, C): c0 and c1 without the microbatch's own part; the means of dy and dy * x_hat */
    int64_t G, C, size;  /* size: of a number, 4 or 8 bytes */
    int64_t all, each;   /* values of a channel in all groups, and in one; the last may have fewer */
    double own, eps, rate;
};

#define A float
#define NAME(f) f##_f32
#include "moving.c" /* the part after #else, for each type */
#undef A
#undef NAME

#define A double
#define NAME(f) f##_f64
#include "moving.c"

int brn_size_of_moving(void) { return (int)sizeof(struct moving); }

/* What there is to be added to `own` times the means of dy and dy * x_hat. */
void brn_given(const void *packed)
{
    struct moving m;
    memcpy(&m, packed, sizeof m);
    if (m.size == sizeof(float))
        given_f32(&m);
    else
        given_f64(&m);
}

/* The move of mean and slope by what they leave of dy. */
void brn_move_gradient(const void *packed)
{
    struct moving m;
    memcpy(&m, packed, sizeof m);
    if (m.size == sizeof(float))
        move_f32(&m);
    else
        move_f64(&m);
}

#else

static void NAME(given)(const struct moving *m)
{
    int64_t GC = m->G * m->C;
    const A *scale = (const A *)m->vectors + 3 * GC, *shift = scale + GC, *mean = m->mean, *slope = m->slope;
    A *given = m->means, *given_x_hat = given + GC, rest = (A)(1 - m->own);
    for (int64_t i = 0; i < GC; i += m->C)
        for (int64_t c = 0; c < m->C; c++) {
            given[i + c] = rest * (mean[c] + shift[i + c] * slope[c]);
            given_x_hat[i + c] = rest * scale[i + c] * slope[c];
        }
}

static void NAME(move)(const struct moving *m)
{
    enum { SOME = 64 };
    int64_t GC = m->G * m->C;
    const A *std = (const A *)m->vectors + 2 * GC, *scale = std + GC, *shift = scale + GC;
    const A *dy = (const A *)m->means + 2 * GC, *dy_x_hat = dy + GC;
    A *mean = m->mean, *slope = m->slope, eps = (A)m->eps;
    for (int64_t first = 0; first < m->C; first += SOME) {
        int64_t n = m->C - first < SOME ? m->C - first : SOME;
        double residual[SOME] = {0}, residual_h[SOME] = {0}, squares[SOME] = {0};
        for (int64_t g = 0; g < m->G; g++) {
            double share = (double)(g < m->G - 1 ? m->each : m->all - g * m->each) / (double)m->all;
            int64_t i = g * m->C + first;
            for (int64_t c = 0; c < n; c++) {
                /* x_hat has mean 0 and mean square var / (var + eps). */
                A r = scale[i + c], d = shift[i + c], square = r * r * (1 - eps / (std[i + c] * std[i + c])) + d * d;
                A left = dy[i + c] - (mean[first + c] + d * slope[first + c]);
                A left_h = r * dy_x_hat[i + c] + d * (dy[i + c] - mean[first + c]) - square * slope[first + c];
                residual[c] += share * (double)left;
                residual_h[c] += share * (double)left_h;
                squares[c] += share * (double)square;
            }
        }
        for (int64_t c = 0; c < n; c++) {
            A new_mean = mean[first + c] + (A)(m->rate * residual[c]);
            A new_slope = slope[first + c] + (A)(m->rate * residual_h[c] / (squares[c] > 1 ? squares[c] : 1));
            /* An overflow must not poison what the next steps subtract: a gradient scaler will skip this one. */
            int finite = isfinite(new_mean) && isfinite(new_slope);
            mean[first + c] = finite ? new_mean : mean[first + c];
            slope[first + c] = finite ? new_slope : slope[first + c];
        }
    }
}

#endif
