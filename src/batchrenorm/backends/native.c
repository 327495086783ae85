/* Batch norm's two passes and its backward on the CPU, for the backend `native`. No header of torch or Python.
 *
 * A tensor is either planes, (N, C, S) with the S values of a channel together, or rows, (N, C) with the channels
 * together: dense layers and channels_last. It is cut into units, the same ones whatever the number of threads, whose
 * results are joined in order: so no result depends on the number of threads. Nor on the kind of processor: vectors
 * have a fixed length here, and there is no contraction to fused multiply-adds (the build says -ffp-contract=off).
 */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* GNU OpenMP's entry, which LLVM's and Intel's runtimes have as well: given by the caller from the runtime that torch
 * has loaded, so that there is one pool of threads. And the number of the calling thread in it. */
typedef void (*parallel_region)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*thread_number)(void);

/* native.py packs it. */
struct pass {
    const void *x, *dy;
    void *out;
    void *vectors;            /* (5, G, C) of type A: mean, var, std, scale, shift */
    const void *weight, *bias; /* (C,) of type A, or NULL */
    void *weight_grad, *bias_grad; /* likewise; in the backward NULL, as is out, where nobody needs it */
    const void *residual, *y;      /* added in the forward; the output, where the backward has to see the ReLU in it */
    void *residual_grad;           /* where there is a ReLU behind it, else it is dy */
    parallel_region parallel;
    thread_number thread;
    int64_t relu, threads, type, rows; /* rows: 1, planes: 0 */
    int64_t N, C, S, size;       /* size: samples (or rows) of a group; the last one may be smaller */
    double eps;
    /* From here on set by this file. */
    void *mean, *var, *std, *scale, *shift;
    int64_t groups, parts, part, chunks, chunk;
    void *a, *b, *c; /* (G, C) coefficients of a pass */
    double *partial;   /* (G, parts, 2, C): what each unit has found */
    /* Where the backward is to subtract other means of dy and dy * x_hat than the group's own: `own` of these and what is
     * given for some channels, from dy times a factor; and who wants to see the sums afterwards. Else NULL. */
    void (*given)(const void *argument, int64_t g, int64_t c0, int64_t c1, void *of_dy, void *of_dy_x_hat, void *factor);
    void (*seen)(const void *argument, const double *sums, int64_t stride);
    const void *argument;
    double own;
};

struct pair {
    double first, second;
};

struct unit {
    int64_t group, n0, n1, c0, c1; /* samples (or rows) and channels */
    double *first, *second;        /* from c0 on: mean and sum of (x - mean)², or sum of dy and of dy * (x - mean) */
};

enum {
    BLOCK = 1024, /* values of a plane that are added up in float: twice they stay in the first cache */
    LEAF = 128,   /* rows likewise */
    CHANNELS = 1024,
};

/* What a unit finds while it works. Handed over at the end: in shared memory two units of few channels would be in one
 * cache line, which then goes to and fro between their cores. */
struct found {
    double first[CHANNELS], second[CHANNELS];
};

static inline struct unit found_in(struct unit u, struct found *found)
{
    u.first = found->first;
    u.second = found->second;
    return u;
}

static inline void hand_over(struct unit u, const struct found *found)
{
    memcpy(u.first, found->first, (size_t)(u.c1 - u.c0) * sizeof(double));
    memcpy(u.second, found->second, (size_t)(u.c1 - u.c0) * sizeof(double));
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The next of the blocks that a plane is cut into: none is shorter than a vector if the plane is not. */
static inline int64_t block_of(int64_t left) { return left < 2 * BLOCK ? left : BLOCK; }

/* Joins two sets of values: a of n of them, b of `share` of both together (Chan, Golub & LeVeque 1983). */
static inline void join(double *mean, double *squares, double n, double share, double b_mean, double b_squares)
{
    double d = b_mean - *mean;
    *mean = n == 0 ? b_mean : *mean + d * share;
    *squares = n == 0 ? b_squares : *squares + (b_squares + d * d * (n * share));
}

/* ------------------------------------------------------------------------------------------------------- the work */

typedef void (*work)(const struct pass *, struct unit);

enum { RANGES = 64 };

struct region {
    const struct pass *pass;
    work work;
    int64_t units, ranges;
    int backwards;
    struct {
        int64_t taken;
        char apart[64 - sizeof(int64_t)]; /* in a cache line of its own: most of the time one thread writes it */
    } range[RANGES];
};

static struct unit unit_of(const struct pass *pass, int64_t index)
{
    int64_t chunk = index % pass->chunks, part = index / pass->chunks % pass->parts, g = index / pass->chunks / pass->parts;
    int64_t end = least((g + 1) * pass->size, pass->N), first = least(g * pass->size + part * pass->part, end);
    double *partial = pass->partial + (g * pass->parts + part) * 2 * pass->C + chunk * pass->chunk;
    return (struct unit){
        .group = g,
        .n0 = first,
        .n1 = least(first + pass->part, end),
        .c0 = chunk * pass->chunk,
        .c1 = least((chunk + 1) * pass->chunk, pass->C),
        .first = partial,
        .second = partial + pass->C,
    };
}

/* Every thread begins with the range of its number, in every pass the same one, whose memory is in the caches of its
 * core; then it helps the others. */
static void take_units(void *data)
{
    struct region *r = data;
    int64_t own = r->ranges > 1 ? r->pass->thread() % r->ranges : 0;
    for (int64_t i = 0; i < r->ranges; i++) {
        int64_t range = (own + i) % r->ranges;
        int64_t first = range * r->units / r->ranges, end = (range + 1) * r->units / r->ranges;
        for (;;) {
            int64_t u = first + __atomic_fetch_add(&r->range[range].taken, 1, __ATOMIC_RELAXED);
            if (u >= end)
                break;
            r->work(r->pass, unit_of(r->pass, r->backwards ? first + end - 1 - u : u));
        }
    }
}

/* A second pass goes backwards: what the first one touched last is still in the caches. */
static void every_unit(const struct pass *pass, work work, int backwards)
{
    struct region r;
    r.pass = pass, r.work = work, r.backwards = backwards;
    r.units = pass->groups * pass->parts * pass->chunks;
    r.ranges = pass->parallel ? least(least(pass->threads, r.units), RANGES) : 1;
    for (int64_t i = 0; i < r.ranges; i++)
        r.range[i].taken = 0;
    if (r.ranges > 1)
        pass->parallel(take_units, &r, (unsigned)least(pass->threads, r.units), 0);
    else
        take_units(&r);
}

static void divide(struct pass *pass)
{
    /* Planes: 8 KiB and more of one sample in a row, so that memory is read in stretches, and whole channels, which
     * the backward can then take twice from the cache, unless they are very large. */
    int64_t wanted = pass->rows ? CHANNELS : (2048 + pass->S - 1) / pass->S, elements = pass->rows ? 1 << 16 : 1 << 18;
    pass->chunk = least(least(wanted, CHANNELS), pass->C);
    pass->chunks = (pass->C + pass->chunk - 1) / pass->chunk;
    pass->groups = (pass->N + pass->size - 1) / pass->size;
    pass->part = elements / (pass->chunk * pass->S);
    pass->part = least(pass->part < 1 ? 1 : pass->part, pass->size);
    /* Units in fours, and of one size: else one of two or four threads would wait for another. */
    int64_t others = pass->groups * pass->chunks, fours = others % 4 == 0 ? 1 : others % 2 == 0 ? 2 : 4;
    pass->parts = (pass->size + pass->part - 1) / pass->part;
    if (pass->parts > 1) {
        pass->parts = (pass->parts + fours - 1) / fours * fours;
        pass->part = (pass->size + pass->parts - 1) / pass->parts;
        pass->part = pass->rows ? (pass->part + 7) / 8 * 8 : pass->part; /* as many rows as are read at a time */
        pass->parts = (pass->size + pass->part - 1) / pass->part;
    }
}

/* Samples (or rows) of a group. */
static int64_t count(const struct pass *pass, int64_t g)
{
    return least((g + 1) * pass->size, pass->N) - g * pass->size;
}

/* ------------------------------------------------------------------------------------------------ types of x, and A */

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int64_t i64x4 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

static inline f32x8 load_f32(const float *p)
{
    f32x8 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store_f32(float *p, f32x8 v) { memcpy(p, &v, sizeof v); }

static inline f64x4 load_f64(const double *p)
{
    f64x4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store_f64(double *p, f64x4 v) { memcpy(p, &v, sizeof v); }

static inline u32x8 load_u16(const uint16_t *p)
{
    u16x8 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, u32x8);
}
static inline void store_u16(uint16_t *p, u32x8 v)
{
    u16x8 half = __builtin_convertvector(v, u16x8);
    memcpy(p, &half, sizeof half);
}

/* All ones where a comparison holds; the cast is for compilers whose comparisons are signed. */
static inline u32x8 pick(u32x8 condition, u32x8 yes, u32x8 no) { return (condition & yes) | (~condition & no); }

static inline f32x8 load_bf16(const uint16_t *p) { return (f32x8)(load_u16(p) << 16); }
/* In the upper halves. */
static inline u32x8 round_bf16(f32x8 v)
{
    u32x8 bits = (u32x8)v;
    return pick((u32x8)(v != v), (u32x8){0} + 0x7fc00000, bits + 0x7fff + ((bits >> 16) & 1));
}
static inline void store_bf16(uint16_t *p, f32x8 v) { store_u16(p, round_bf16(v) >> 16); }
/* Those with even numbers and those with odd ones: no element changes its place. */
static inline f32x8 even_bf16(const uint16_t *p)
{
    u32x8 both;
    memcpy(&both, p, sizeof both);
    return (f32x8)(both << 16);
}
static inline f32x8 odd_bf16(const uint16_t *p)
{
    u32x8 both;
    memcpy(&both, p, sizeof both);
    return (f32x8)(both & 0xffff0000);
}
static inline void store_pair_bf16(uint16_t *p, f32x8 v, f32x8 w)
{
    u32x8 both = round_bf16(v) >> 16 | (round_bf16(w) & 0xffff0000);
    memcpy(p, &both, sizeof both);
}

#ifdef __F16C__ /* in every processor that has AVX2; the same numbers as below */
typedef int16_t i16x8 __attribute__((vector_size(16)));

static inline f32x8 load_f16(const uint16_t *p)
{
    i16x8 half;
    memcpy(&half, p, sizeof half);
    return __builtin_ia32_vcvtph2ps256(half);
}
static inline void store_f16(uint16_t *p, f32x8 v)
{
    i16x8 half = (i16x8)__builtin_ia32_vcvtps2ph256(v, 0); /* 0: to the nearest, ties to even */
    memcpy(p, &half, sizeof half);
}
#else
/* Powers of two move the exponent between the two biases; float's arithmetic sees to subnormals. */
static inline f32x8 load_f16(const uint16_t *p)
{
    u32x8 half = load_u16(p), magnitude = half & 0x7fff;
    u32x8 bits = (u32x8)((f32x8)(magnitude << 13) * 0x1p112f);
    bits |= (u32x8)(magnitude >= 0x7c00) & 0x7f800000;
    return (f32x8)(bits | (half & 0x8000) << 16);
}
static inline void store_f16(uint16_t *p, f32x8 v)
{
    u32x8 bits = (u32x8)v, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    u32x8 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    /* Next to 0.5 a unit in the last place is 2^-24, half's smallest number. */
    u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000;
    u32x8 half = pick((u32x8)(magnitude < 0x38800000), subnormal, normal);
    half = pick((u32x8)(magnitude >= 0x477ff000), (u32x8){0} + 0x7c00, half); /* 65520 and more */
    half = pick((u32x8)(magnitude > 0x7f800000), (u32x8){0} + 0x7e00, half);
    store_u16(p, half | sign);
}
#endif

/* The usual order. */
#define FIRST(p) LOAD(p)
#define SECOND(p) LOAD((p) + LANES)
#define STORE_PAIR(p, v, w) (STORE(p, v), STORE((p) + LANES, w))
#define HALF(i) ((i) / LANES)
#define LANE(i) ((i) % LANES)

#define A float
#define V f32x8
#define LANES 8
#define INT int32_t
#define INTS i32x8
#define MORE_LANES , -1, -1, -1, -1
#define SQRT sqrtf

#define T float
#define NAME(f) f##_f32
#define LOAD load_f32
#define STORE store_f32
#include "native_passes.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE

#define T uint16_t
#define NAME(f) f##_bf16
#define LOAD load_bf16
#define STORE store_bf16
#undef FIRST
#undef SECOND
#undef STORE_PAIR
#undef HALF
#undef LANE
#define FIRST even_bf16
#define SECOND odd_bf16
#define STORE_PAIR store_pair_bf16
#define HALF(i) ((i) % 2)
#define LANE(i) ((i) / 2)
#include "native_passes.h"
#undef FIRST
#undef SECOND
#undef STORE_PAIR
#undef HALF
#undef LANE
#define FIRST(p) LOAD(p)
#define SECOND(p) LOAD((p) + LANES)
#define STORE_PAIR(p, v, w) (STORE(p, v), STORE((p) + LANES, w))
#define HALF(i) ((i) / LANES)
#define LANE(i) ((i) % LANES)
#undef NAME
#undef LOAD
#undef STORE

#define NAME(f) f##_f16
#define LOAD load_f16
#define STORE store_f16
#include "native_passes.h"
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef A
#undef V
#undef LANES
#undef SQRT

#define A double
#define V f64x4
#undef INT
#undef INTS
#undef MORE_LANES
#define LANES 4
#define INT int64_t
#define INTS i64x4
#define MORE_LANES
#define SQRT sqrt
#define T double
#define NAME(f) f##_f64
#define LOAD load_f64
#define STORE store_f64
#include "native_passes.h"

/* ----------------------------------------------------------------------------------------------------- entry points */

static const struct type {
    int64_t size; /* of A */
    int (*moments)(struct pass *), (*affine)(struct pass *), (*backward)(struct pass *), (*gradient)(struct pass *);
} TYPES[] = {
    {sizeof(float), moments_f32, affine_f32, backward_f32, gradient_f32},
    {sizeof(float), moments_bf16, affine_bf16, backward_bf16, gradient_bf16},
    {sizeof(float), moments_f16, affine_f16, backward_f16, gradient_f16},
    {sizeof(double), moments_f64, affine_f64, backward_f64, gradient_f64},
};

/* How much the caller hands over: by this a library that is older than its native.py gives itself away. */
int brn_size_of_pass(void) { return (int)offsetof(struct pass, mean); }

static struct pass unpack(const void *packed)
{
    struct pass pass = {0};
    memcpy(&pass, packed, offsetof(struct pass, mean));
    divide(&pass);
    void **vectors[] = {&pass.mean, &pass.var, &pass.std, &pass.scale, &pass.shift};
    for (int i = 0; i < 5; i++)
        *vectors[i] = (char *)pass.vectors + i * pass.groups * pass.C * TYPES[pass.type].size;
    return pass;
}

/* mean, var and std from x. Like the other passes it returns 0, or 1 if there is no memory. */
int brn_moments(const void *packed)
{
    struct pass pass = unpack(packed);
    return TYPES[pass.type].moments(&pass);
}

/* out = weight * ((x - mean) / std * scale + shift) + bias; + residual, and max(0, .), where they are asked for */
int brn_affine(const void *packed)
{
    struct pass pass = unpack(packed);
    return TYPES[pass.type].affine(&pass);
}

/* Both, and between them the function that makes scale and shift of the moments. */
int brn_forward(const void *packed, void (*between)(const void *), const void *argument)
{
    struct pass pass = unpack(packed);
    if (TYPES[pass.type].moments(&pass))
        return 1;
    between(argument);
    return TYPES[pass.type].affine(&pass);
}

/* From dy: out, weight_grad, bias_grad and residual_grad, the gradients with respect to x (through mean and std), weight,
 * bias and the residual. */
int brn_backward(const void *packed)
{
    struct pass pass = unpack(packed);
    return TYPES[pass.type].backward(&pass);
}

/* The same with other means subtracted: see `struct pass`. */
int brn_backward_given(const void *packed, double own, void *given, void *seen, const void *argument)
{
    struct pass pass = unpack(packed);
    memcpy(&pass.given, &given, sizeof given);
    memcpy(&pass.seen, &seen, sizeof seen);
    pass.argument = argument;
    pass.own = own;
    return TYPES[pass.type].backward(&pass);
}

/* The second half of it, for callers who have the sums of more than this x: out = dy * a + ((x - mean) * b + c), with a and
 * b where scale and shift are in the forward, and c in place of bias. */
int brn_gradient(const void *packed)
{
    struct pass pass = unpack(packed);
    pass.a = pass.scale, pass.b = pass.shift, pass.c = (void *)pass.bias;
    return TYPES[pass.type].gradient(&pass);
}
