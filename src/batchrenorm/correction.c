/* The paper on (C,)-vectors in one call: what `_used_averages`, `_r_d` and `_moved` in correction.py do with a dozen of
 * torch's operators, each of which takes longer to call than such a vector takes to compute. The same numbers to a unit
 * or two of the last place: torch's vectorised square root is not correctly rounded.
 */

#ifndef A

#include <math.h>
#include <stdint.h>
#include <string.h>

/* correction.py packs it. */
struct step {
    void *vectors;                      /* (5, G, C): mu_B, its variance, sigma_B, r, d */
    void *running_mean, *running_var;   /* (C,) */
    int64_t *counter;                   /* of training forwards, or NULL */
    void *averages;                     /* (5, C): mean and sigma of G > 1 groups, sigma used, new mean, new variance */
    int64_t G, C, size;                 /* size: of a number, 4 or 8 bytes */
    double alpha, eps, r_max, d_max;
};

#define A float
#define NAME(f) f##_f32
#define SQRT sqrtf
#include "correction.c" /* the part after #else, for each type */
#undef A
#undef NAME
#undef SQRT

#define A double
#define NAME(f) f##_f64
#define SQRT sqrt
#include "correction.c"

int brn_size_of_step(void) { return (int)sizeof(struct step); }

/* r and d from the averages before the step, and what these will be after it. */
void brn_correct(const void *packed)
{
    struct step s;
    memcpy(&s, packed, sizeof s);
    if (s.size == sizeof(float))
        correct_f32(&s);
    else
        correct_f64(&s);
}

/* The move of the averages, and of the counter, for when nothing can fail any more. */
void brn_move(const void *packed)
{
    struct step s;
    memcpy(&s, packed, sizeof s);
    const char *moved = (char *)s.averages + 3 * s.C * s.size;
    memcpy(s.running_mean, moved, (size_t)(s.C * s.size));
    memcpy(s.running_var, moved + s.C * s.size, (size_t)(s.C * s.size));
    if (s.counter)
        ++*s.counter;
}

#else

static inline A NAME(clip)(A v, A low, A high) { return v < low ? low : v > high ? high : v; }

static inline A NAME(lerp)(A from, A to, A weight)
{
    return weight < (A)0.5 ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

static void NAME(correct)(const struct step *s)
{
    int64_t GC = s->G * s->C;
    const A *mu_B = s->vectors, *sigma_B = mu_B + 2 * GC, *mu = s->running_mean, *var = s->running_var;
    A *r = (A *)s->vectors + 3 * GC, *d = r + GC;
    A *mean_of_groups = s->averages, *std_of_groups = mean_of_groups + s->C, *sigma = std_of_groups + s->C, *new_mean = sigma + s->C,
      *new_var = new_mean + s->C;
    const A *mean = mean_of_groups, *std = std_of_groups;
    A eps = (A)s->eps, alpha = (A)s->alpha, r_max = (A)s->r_max, r_min = (A)(1 / s->r_max), d_max = (A)s->d_max;
    for (int64_t c = 0; c < s->C; c++)
        sigma[c] = SQRT(var[c] + eps);
    for (int64_t i = 0; i < GC; i += s->C)
        for (int64_t c = 0; c < s->C; c++) {
            r[i + c] = NAME(clip)(sigma_B[i + c] / sigma[c], r_min, r_max);
            d[i + c] = NAME(clip)((mu_B[i + c] - mu[c]) / sigma[c], -d_max, d_max);
        }
    /* With several groups one update by the mean of their means and of their sigmas: sigma stays E[sigma_B]. */
    enum { SOME = 64 };
    if (s->G == 1)
        mean = mu_B, std = sigma_B;
    for (int64_t first = 0; s->G > 1 && first < s->C; first += SOME) {
        int64_t n = s->C - first < SOME ? s->C - first : SOME;
        double mean_sum[SOME] = {0}, std_sum[SOME] = {0};
        for (int64_t i = first; i < GC; i += s->C)
            for (int64_t c = 0; c < n; c++) {
                mean_sum[c] += (double)mu_B[i + c];
                std_sum[c] += (double)sigma_B[i + c];
            }
        for (int64_t c = 0; c < n; c++) {
            mean_of_groups[first + c] = (A)(mean_sum[c] / (double)s->G);
            std_of_groups[first + c] = (A)(std_sum[c] / (double)s->G);
        }
    }
    /* In steps that compilers turn into vectors. */
    for (int64_t c = 0; c < s->C; c++)
        new_mean[c] = NAME(lerp)(mu[c], mean[c], alpha);
    for (int64_t c = 0; c < s->C; c++) {
        A moved_sigma = NAME(lerp)(sigma[c], std[c], alpha), moved_var = moved_sigma * moved_sigma - eps;
        /* sigma² - eps, but never below 0, where rounding could take it if the channel is constant. */
        new_var[c] = moved_var < 0 ? 0 : moved_var;
    }
    /* A channel that overflowed must not poison the averages: a gradient scaler will skip this step. */
    for (int64_t c = 0; c < s->C; c++) {
        A moved_mean = new_mean[c], moved_var = new_var[c], overflow = (moved_mean - moved_mean) + (moved_var - moved_var);
        new_mean[c] = overflow == 0 ? moved_mean : mu[c];
        new_var[c] = overflow == 0 ? moved_var : var[c];
    }
}

#endif
