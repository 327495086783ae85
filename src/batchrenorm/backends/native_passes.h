/* The passes for one type of x. Included once for each by native.c, which defines
 *
 *   NAME(f)      f with the type's suffix
 *   T, A         type of x in memory, and of statistics and arithmetic
 *   V, LANES     vector of A, and how many it holds
 *   LOAD(p)      V from T *, of any alignment;  STORE(p, v) back
 *   SQRT         of A
 *   FIRST(p), SECOND(p), STORE_PAIR(p, v, w)   two vectors at once, of 2 * LANES numbers in the quickest order:
 *   HALF(i), LANE(i)                           in which of the two, and where, number i is
 */

/* Loops over vectors step back to a whole one at the end. Only what is shorter than a vector takes these, n < LANES. */
static inline V NAME(load_part)(const T *p, int64_t n)
{
    T padded[LANES] = {0};
    for (int64_t width = LANES / 2, i = 0; width; width /= 2)
        if (n & width) {
            memcpy(padded + i, p + i, (size_t)width * sizeof(T));
            i += width;
        }
    return LOAD(padded);
}

static inline void NAME(store_part)(T *p, V v, int64_t n)
{
    T padded[LANES];
    STORE(padded, v);
    for (int64_t width = LANES / 2, i = 0; width; width /= 2)
        if (n & width) {
            memcpy(p + i, padded + i, (size_t)width * sizeof(T));
            i += width;
        }
}

static inline V NAME(vector)(const A *p)
{
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline V NAME(vector_part)(const A *p, int64_t n)
{
    V v = {0};
    memcpy(&v, p, (size_t)n * sizeof(A));
    return v;
}

/* The last n of a vector, the others 0. */
static inline V NAME(last)(V v, int64_t n)
{
    static const INT mask[2 * LANES] = {[LANES] = -1, -1, -1, -1 MORE_LANES};
    INTS keep;
    memcpy(&keep, mask + n, sizeof keep);
    return (V)((INTS)v & keep);
}

static inline double NAME(sum)(V v)
{
    A half[LANES / 2], total = 0;
    for (int i = 0; i < LANES / 2; i++)
        half[i] = v[i] + v[i + LANES / 2];
    for (int i = 0; i < LANES / 2; i++)
        total += half[i];
    return (double)total;
}

static inline V NAME(relu)(V v) { return (V)((INTS)v & ~(v <= (A)0)); } /* NaN stays */

/* dy where the output of the ReLU was not 0. */
static inline V NAME(gate)(V y, V dy) { return (V)((INTS)dy & ~(y <= (A)0)); }

/* y = (x - mean) * a + c, for the channels of a unit */
static void NAME(effective_affine)(const struct pass *pass, struct unit u, A *a, A *c)
{
    int64_t first = u.group * pass->C + u.c0, width = u.c1 - u.c0;
    const A *scale = (const A *)pass->scale + first, *std = (const A *)pass->std + first;
    for (int64_t k = 0; k < width; k++)
        a[k] = scale[k] / std[k];
    memcpy(c, (const A *)pass->shift + first, (size_t)width * sizeof(A));
    for (int64_t k = 0; pass->weight && k < width; k++) {
        a[k] *= ((const A *)pass->weight)[u.c0 + k];
        c[k] *= ((const A *)pass->weight)[u.c0 + k];
    }
    for (int64_t k = 0; pass->bias && k < width; k++)
        c[k] += ((const A *)pass->bias)[u.c0 + k];
}

/* ---------------------------------------------------------------- planes: (N, C, S), S values of a channel together */

/* One block, as deviations from the mean of its first values. These belong to it, so they are no further from its mean
 * than sqrt(n / 32) of its standard deviations: whatever x, the squares lose less than two digits of float's seven. */
static struct pair NAME(moments_of_block)(const T *x, int64_t n)
{
    int64_t i = 0, rest = n % LANES;
    V s[4] = {{0}}, q[4] = {{0}}, v[4], end = {0};
    A k;
    if (n >= 4 * LANES) {
        v[0] = FIRST(x), v[1] = SECOND(x);
        v[2] = FIRST(x + 2 * LANES), v[3] = SECOND(x + 2 * LANES);
        k = (A)NAME(sum)((v[0] + v[1]) + (v[2] + v[3])) / (A)(4 * LANES);
    } else {
        A sum = 0;
        for (int64_t j = 0; j < n; j += LANES)
            sum += (A)NAME(sum)(n - j < LANES ? NAME(load_part)(x + j, n - j) : LOAD(x + j));
        k = sum / (A)n;
    }
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        v[0] = FIRST(x + i), v[1] = SECOND(x + i);
        v[2] = FIRST(x + i + 2 * LANES), v[3] = SECOND(x + i + 2 * LANES);
        for (int j = 0; j < 4; j++) {
            V d = v[j] - k;
            s[j] += d;
            q[j] += d * d;
        }
    }
    for (; i + LANES <= n; i += LANES) {
        V d = LOAD(x + i) - k;
        s[0] += d;
        q[0] += d * d;
    }
    if (rest) {
        if (n >= LANES)
            end = NAME(last)(LOAD(x + n - LANES) - k, rest);
        else {
            end = NAME(load_part)(x, n);
            for (int j = 0; j < n; j++)
                end[j] -= k;
        }
        s[1] += end;
        q[1] += end * end;
    }
    double off = NAME(sum)((s[0] + s[1]) + (s[2] + s[3])) / (double)n;
    double squares = NAME(sum)((q[0] + q[1]) + (q[2] + q[3])) - off * off * (double)n;
    return (struct pair){(double)k + off, squares < 0 ? 0 : squares};
}

static void NAME(moments_of_planes)(const struct pass *pass, struct unit u)
{
    int64_t C = pass->C, S = pass->S;
    for (int64_t n = u.n0; n < u.n1; n++)
        for (int64_t i = 0, block; i < S; i += block) {
            block = block_of(S - i);
            double before = (double)((n - u.n0) * S + i), share = (double)block / (before + (double)block);
            for (int64_t c = 0; c < u.c1 - u.c0; c++) {
                struct pair found = NAME(moments_of_block)((const T *)pass->x + (n * C + u.c0 + c) * S + i, block);
                join(u.first + c, u.second + c, before, share, found.first, found.second);
            }
        }
}

/* out = (x - mean) * a + c; then the residual is added, and the ReLU taken, where `more` and `relu`, constants, say so. */
static inline __attribute__((always_inline)) void NAME(affine_of_planes_as)(const struct pass *pass, struct unit u,
                                                                            int more, int relu)
{
    int64_t C = pass->C, S = pass->S;
    const A *mean = (const A *)pass->mean + u.group * C + u.c0;
    A a[CHANNELS], c[CHANNELS];
    NAME(effective_affine)(pass, u, a, c);
    for (int64_t n = u.n0; n < u.n1; n++)
        for (int64_t k = 0; k < u.c1 - u.c0; k++) {
            int64_t first = (n * C + u.c0 + k) * S;
            const T *x = (const T *)pass->x + first, *residual = more ? (const T *)pass->residual + first : NULL;
            T *out = (T *)pass->out + first;
            A mean_k = mean[k], a_k = a[k], c_k = c[k];
            if (S < LANES) {
                V v = (NAME(load_part)(x, S) - mean_k) * a_k + c_k;
                v = more ? v + NAME(load_part)(residual, S) : v;
                NAME(store_part)(out, relu ? NAME(relu)(v) : v, S);
            } else {
                int64_t i = 0;
                for (; i + 2 * LANES <= S; i += 2 * LANES) {
                    V v = (FIRST(x + i) - mean_k) * a_k + c_k, w = (SECOND(x + i) - mean_k) * a_k + c_k;
                    if (more)
                        v += FIRST(residual + i), w += SECOND(residual + i);
                    STORE_PAIR(out + i, relu ? NAME(relu)(v) : v, relu ? NAME(relu)(w) : w);
                }
                for (; i < S; i += LANES) {
                    i = least(i, S - LANES);
                    V v = (LOAD(x + i) - mean_k) * a_k + c_k;
                    v = more ? v + LOAD(residual + i) : v;
                    STORE(out + i, relu ? NAME(relu)(v) : v);
                }
            }
        }
}

static void NAME(affine_of_planes)(const struct pass *pass, struct unit u)
{
    if (pass->residual)
        pass->relu ? NAME(affine_of_planes_as)(pass, u, 1, 1) : NAME(affine_of_planes_as)(pass, u, 1, 0);
    else
        pass->relu ? NAME(affine_of_planes_as)(pass, u, 0, 1) : NAME(affine_of_planes_as)(pass, u, 0, 0);
}

/* dy through the ReLU, for n values of a channel from `first` on: they are written to `gated`, or to the gradient of the
 * residual, from which the second pass then reads them. Whether the ReLU was open is seen from its output where that was
 * kept, and else from the affine map, computed as it was in the forward, to the last bit. */
static const T *NAME(dy_of_block)(const struct pass *pass, int64_t first, int64_t n, A mean, A a, A c, int again, T *gated)
{
    const T *x = (const T *)pass->x + first, *dy = (const T *)pass->dy + first;
    const T *y = pass->y ? (const T *)pass->y + first : NULL;
    if (!pass->relu)
        return dy;
    if (pass->residual_grad) {
        gated = (T *)pass->residual_grad + first;
        if (again)
            return gated;
    }
    if (n < LANES) {
        V v = y ? NAME(load_part)(y, n) : (NAME(load_part)(x, n) - mean) * a + c;
        NAME(store_part)(gated, NAME(gate)(v, NAME(load_part)(dy, n)), n);
        return gated;
    }
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        V v = y ? FIRST(y + i) : (FIRST(x + i) - mean) * a + c, w = y ? SECOND(y + i) : (SECOND(x + i) - mean) * a + c;
        STORE_PAIR(gated + i, NAME(gate)(v, FIRST(dy + i)), NAME(gate)(w, SECOND(dy + i)));
    }
    for (; i < n; i += LANES) {
        i = least(i, n - LANES);
        V v = y ? LOAD(y + i) : (LOAD(x + i) - mean) * a + c;
        STORE(gated + i, NAME(gate)(v, LOAD(dy + i)));
    }
    return gated;
}

static struct pair NAME(sums_of_block)(const T *x, const T *dy, A mean, int64_t n)
{
    int64_t i = 0, rest = n % LANES;
    V s[4] = {{0}}, p[4] = {{0}}, v[4], w[4], g;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        v[0] = FIRST(x + i), v[1] = SECOND(x + i);
        v[2] = FIRST(x + i + 2 * LANES), v[3] = SECOND(x + i + 2 * LANES);
        w[0] = FIRST(dy + i), w[1] = SECOND(dy + i);
        w[2] = FIRST(dy + i + 2 * LANES), w[3] = SECOND(dy + i + 2 * LANES);
        for (int j = 0; j < 4; j++) {
            s[j] += w[j];
            p[j] += w[j] * (v[j] - mean);
        }
    }
    for (; i + LANES <= n; i += LANES) {
        g = LOAD(dy + i);
        s[0] += g;
        p[0] += g * (LOAD(x + i) - mean);
    }
    if (rest) {
        g = n < LANES ? NAME(load_part)(dy, n) : NAME(last)(LOAD(dy + n - LANES), rest);
        s[1] += g;
        p[1] += g * ((n < LANES ? NAME(load_part)(x, n) : LOAD(x + n - LANES)) - mean);
    }
    return (struct pair){NAME(sum)((s[0] + s[1]) + (s[2] + s[3])), NAME(sum)((p[0] + p[1]) + (p[2] + p[3]))};
}

static void NAME(sums_of_planes)(const struct pass *pass, struct unit u)
{
    int64_t C = pass->C, S = pass->S;
    const A *mean = (const A *)pass->mean + u.group * C + u.c0;
    A a[CHANNELS], c[CHANNELS];
    T gated[2 * BLOCK];
    if (pass->relu)
        NAME(effective_affine)(pass, u, a, c);
    memset(u.first, 0, (size_t)(u.c1 - u.c0) * sizeof(double));
    memset(u.second, 0, (size_t)(u.c1 - u.c0) * sizeof(double));
    for (int64_t n = u.n0; n < u.n1; n++)
        for (int64_t k = 0; k < u.c1 - u.c0; k++)
            for (int64_t i = 0, block; i < S; i += block) {
                int64_t first = (n * C + u.c0 + k) * S + i;
                block = block_of(S - i);
                const T *dy = NAME(dy_of_block)(pass, first, block, mean[k], a[k], c[k], 0, gated);
                struct pair found = NAME(sums_of_block)((const T *)pass->x + first, dy, mean[k], block);
                u.first[k] += found.first;
                u.second[k] += found.second;
            }
}

/* out = dy * a + (x - mean) * b + c */
static void NAME(gradient_of_block)(const T *x, const T *dy, T *out, int64_t n, A mean, A a, A b, A c)
{
    int64_t i = 0;
    if (n < LANES) {
        V d = NAME(load_part)(x, n) - mean;
        NAME(store_part)(out, NAME(load_part)(dy, n) * a + (d * b + c), n);
        return;
    }
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        STORE_PAIR(out + i, FIRST(dy + i) * a + ((FIRST(x + i) - mean) * b + c),
                   SECOND(dy + i) * a + ((SECOND(x + i) - mean) * b + c));
    for (; i < n; i += LANES) {
        i = least(i, n - LANES);
        STORE(out + i, LOAD(dy + i) * a + ((LOAD(x + i) - mean) * b + c));
    }
}

static void NAME(gradient_of_planes)(const struct pass *pass, struct unit u)
{
    int64_t C = pass->C, S = pass->S, v = u.group * C + u.c0;
    const A *mean = (const A *)pass->mean + v, *a = (const A *)pass->a + v, *b = (const A *)pass->b + v,
            *c = (const A *)pass->c + v;
    A opening[CHANNELS], shift[CHANNELS];
    T gated[2 * BLOCK];
    if (pass->relu)
        NAME(effective_affine)(pass, u, opening, shift);
    for (int64_t n = u.n0; n < u.n1; n++)
        for (int64_t k = 0; k < u.c1 - u.c0; k++)
            for (int64_t i = 0, block; i < S; i += block) {
                int64_t first = (n * C + u.c0 + k) * S + i;
                block = block_of(S - i);
                const T *dy = NAME(dy_of_block)(pass, first, block, mean[k], opening[k], shift[k], 1, gated);
                NAME(gradient_of_block)((const T *)pass->x + first, dy, (T *)pass->out + first, block, mean[k], a[k],
                                        b[k], c[k]);
            }
}

/* ------------------------------------------------------- rows: (N * S, C), channels together; also dense (N, C), S = 1
 *
 * Channels are taken in pairs of vectors, whose order is FIRST's and SECOND's, and what remains in vectors of the usual
 * order, the last of which steps back; or in one that is not full, if there are fewer channels than that. */

enum { NAME(PAIR) = 2 * LANES };

static inline V NAME(get)(const T *p, int half, int64_t n)
{
    return half == 0 ? FIRST(p) : half == 1 ? SECOND(p) : n < LANES ? NAME(load_part)(p, n) : LOAD(p);
}

/* From vectors in this order to numbers in that of the channels. */
static inline void NAME(in_order)(const V *v, int64_t width, A *numbers)
{
    int64_t c = 0;
    for (; c + NAME(PAIR) <= width; c += NAME(PAIR), v += 2)
        for (int i = 0; i < NAME(PAIR); i++)
            numbers[c + i] = v[HALF(i)][LANE(i)];
    for (; c + LANES <= width; c += LANES, v++)
        memcpy(numbers + c, v, sizeof *v);
    for (int64_t stepped = width < LANES ? 0 : LANES - (width - c), i = 0; c < width; c++, i++)
        numbers[c] = v[0][stepped + i];
}

/* Deviations of one, four or eight rows from the base: by their own mean, then joined to the `before` rows that m and q
 * stand for. */
static inline void NAME(join_rows)(const T *x, int64_t C, int rows, int half, int64_t n, int64_t before, V base, V *m,
                                   V *q)
{
    V v[8], k, squares = {0};
    for (int i = 0; i < rows; i++)
        v[i] = NAME(get)(x + i * C, half, n) - base;
    k = v[0];
    if (rows >= 4) {
        k = (v[0] + v[1]) + (v[2] + v[3]);
        k = rows == 8 ? (k + ((v[4] + v[5]) + (v[6] + v[7]))) * (A)0.125 : k * (A)0.25;
        for (int i = 0; i < rows; i++)
            squares += (v[i] - k) * (v[i] - k);
    }
    A share = (A)rows / (A)(before + rows);
    V d = k - *m;
    *m += d * share;
    *q += squares + d * d * ((A)before * share);
}

static inline void NAME(join_block)(const T *x, int64_t C, int64_t width, int rows, int64_t before, const V *base, V *m,
                                    V *q)
{
    int64_t c = 0, j = 0;
    for (; c + NAME(PAIR) <= width; c += NAME(PAIR), j += 2) {
        NAME(join_rows)(x + c, C, rows, 0, LANES, before, base[j], m + j, q + j);
        NAME(join_rows)(x + c, C, rows, 1, LANES, before, base[j + 1], m + j + 1, q + j + 1);
    }
    for (; c < width; c += LANES, j++)
        if (width < LANES)
            NAME(join_rows)(x, C, rows, 2, width, before, base[0], m, q);
        else
            NAME(join_rows)(x + least(c, width - LANES), C, rows, 2, LANES, before, base[j], m + j, q + j);
}

/* Some rows at a time, as deviations from the first of them: float then has the digits where they are needed, however
 * far from 0 all of this is. */
static void NAME(moments_of_rows)(const struct pass *pass, struct unit u)
{
    int64_t C = pass->C, rows = u.n1 - u.n0, width = u.c1 - u.c0;
    V base[CHANNELS / LANES], mean[CHANNELS / LANES], squares[CHANNELS / LANES];
    A bases[CHANNELS], means[CHANNELS], sums[CHANNELS];
    size_t used = (size_t)((width + LANES - 1) / LANES) * sizeof(V);
    for (int64_t leaf = 0; leaf < rows; leaf += LEAF) {
        int64_t count = least(LEAF, rows - leaf), r = 0, c = 0, j = 0;
        const T *x = (const T *)pass->x + (u.n0 + leaf) * C + u.c0;
        for (; c + NAME(PAIR) <= width; c += NAME(PAIR)) {
            base[j++] = FIRST(x + c);
            base[j++] = SECOND(x + c);
        }
        for (; c < width; c += LANES)
            base[j++] = width < LANES ? NAME(load_part)(x, width) : LOAD(x + least(c, width - LANES));
        memset(mean, 0, used);
        memset(squares, 0, used);
        for (; r + 8 <= count; r += 8, x += 8 * C)
            NAME(join_block)(x, C, width, 8, r, base, mean, squares);
        for (; r + 4 <= count; r += 4, x += 4 * C)
            NAME(join_block)(x, C, width, 4, r, base, mean, squares);
        for (; r < count; r++, x += C)
            NAME(join_block)(x, C, width, 1, r, base, mean, squares);
        NAME(in_order)(base, width, bases);
        NAME(in_order)(mean, width, means);
        NAME(in_order)(squares, width, sums);
        double share = (double)count / (double)(leaf + count);
        for (c = 0; c < width; c++)
            join(u.first + c, u.second + c, (double)leaf, share, (double)bases[c] + (double)means[c], (double)sums[c]);
    }
}

/* Numbers of the channels in the order of pairs; where that is the usual order, no copy. */
static inline const A *NAME(in_pairs)(const A *p, int64_t width, A *copy)
{
    if (HALF(1) == 0)
        return p;
    for (int64_t c = 0; c + NAME(PAIR) <= width; c += NAME(PAIR))
        for (int i = 0; i < NAME(PAIR); i++)
            copy[c + HALF(i) * LANES + LANE(i)] = p[c + i];
    return copy;
}

static inline __attribute__((always_inline)) void NAME(affine_of_rows_as)(const struct pass *pass, struct unit u,
                                                                          int more, int relu)
{
    int64_t C = pass->C, width = u.c1 - u.c0;
    const A *mean = (const A *)pass->mean + u.group * C + u.c0;
    A a[CHANNELS], c[CHANNELS], copies[3][CHANNELS];
    NAME(effective_affine)(pass, u, a, c);
    const A *mean2 = NAME(in_pairs)(mean, width, copies[0]), *a2 = NAME(in_pairs)(a, width, copies[1]),
            *c2 = NAME(in_pairs)(c, width, copies[2]);
    for (int64_t r = u.n0; r < u.n1; r++) {
        const T *x = (const T *)pass->x + r * C + u.c0, *residual = more ? (const T *)pass->residual + r * C + u.c0 : NULL;
        T *out = (T *)pass->out + r * C + u.c0;
        int64_t k = 0, l = LANES;
        for (; k + NAME(PAIR) <= width; k += NAME(PAIR), l += NAME(PAIR)) {
            V v = (FIRST(x + k) - NAME(vector)(mean2 + k)) * NAME(vector)(a2 + k) + NAME(vector)(c2 + k);
            V w = (SECOND(x + k) - NAME(vector)(mean2 + l)) * NAME(vector)(a2 + l) + NAME(vector)(c2 + l);
            if (more)
                v += FIRST(residual + k), w += SECOND(residual + k);
            STORE_PAIR(out + k, relu ? NAME(relu)(v) : v, relu ? NAME(relu)(w) : w);
        }
        if (width < LANES) {
            V v = NAME(load_part)(x, width) - NAME(vector_part)(mean, width);
            v = v * NAME(vector_part)(a, width) + NAME(vector_part)(c, width);
            v = more ? v + NAME(load_part)(residual, width) : v;
            NAME(store_part)(out, relu ? NAME(relu)(v) : v, width);
        } else
            for (; k < width; k += LANES) {
                k = least(k, width - LANES);
                V v = (LOAD(x + k) - NAME(vector)(mean + k)) * NAME(vector)(a + k) + NAME(vector)(c + k);
                v = more ? v + LOAD(residual + k) : v;
                STORE(out + k, relu ? NAME(relu)(v) : v);
            }
    }
}

static void NAME(affine_of_rows)(const struct pass *pass, struct unit u)
{
    if (pass->residual)
        pass->relu ? NAME(affine_of_rows_as)(pass, u, 1, 1) : NAME(affine_of_rows_as)(pass, u, 1, 0);
    else
        pass->relu ? NAME(affine_of_rows_as)(pass, u, 0, 1) : NAME(affine_of_rows_as)(pass, u, 0, 0);
}

/* What `dy_of_rows` needs for a unit: the affine map, also in the order of pairs, and memory for some rows. */
struct NAME(gates) {
    A a[CHANNELS], c[CHANNELS], copies[3][CHANNELS];
    const A *mean, *mean2, *a2, *c2;
    T gated[8 * CHANNELS];
};

static void NAME(open_gates)(const struct pass *pass, struct unit u, struct NAME(gates) *g)
{
    int64_t width = u.c1 - u.c0;
    if (!pass->relu)
        return;
    g->mean = (const A *)pass->mean + u.group * pass->C + u.c0;
    NAME(effective_affine)(pass, u, g->a, g->c);
    g->mean2 = NAME(in_pairs)(g->mean, width, g->copies[0]);
    g->a2 = NAME(in_pairs)(g->a, width, g->copies[1]);
    g->c2 = NAME(in_pairs)(g->c, width, g->copies[2]);
}

/* `dy_of_block` for up to 8 rows of a unit from `row` on, `stride` apart. */
static const T *NAME(dy_of_rows)(const struct pass *pass, struct unit u, int64_t row, int rows, int again,
                                 struct NAME(gates) *g, int64_t *stride)
{
    int64_t C = pass->C, width = u.c1 - u.c0, first = row * C + u.c0;
    *stride = C;
    if (!pass->relu)
        return (const T *)pass->dy + first;
    if (pass->residual_grad && again)
        return (const T *)pass->residual_grad + first;
    *stride = pass->residual_grad ? C : width;
    T *gated = pass->residual_grad ? (T *)pass->residual_grad + first : g->gated;
    for (int r = 0; r < rows; r++) {
        int64_t at = first + r * C, k = 0, l = LANES;
        const T *x = (const T *)pass->x + at, *dy = (const T *)pass->dy + at, *y = pass->y ? (const T *)pass->y + at : NULL;
        T *out = gated + r * *stride;
        for (; k + NAME(PAIR) <= width; k += NAME(PAIR), l += NAME(PAIR)) {
            V v = y ? FIRST(y + k)
                    : (FIRST(x + k) - NAME(vector)(g->mean2 + k)) * NAME(vector)(g->a2 + k) + NAME(vector)(g->c2 + k);
            V w = y ? SECOND(y + k)
                    : (SECOND(x + k) - NAME(vector)(g->mean2 + l)) * NAME(vector)(g->a2 + l) + NAME(vector)(g->c2 + l);
            STORE_PAIR(out + k, NAME(gate)(v, FIRST(dy + k)), NAME(gate)(w, SECOND(dy + k)));
        }
        if (width < LANES) {
            V d = NAME(load_part)(x, width) - NAME(vector_part)(g->mean, width);
            V v = y ? NAME(load_part)(y, width) : d * NAME(vector_part)(g->a, width) + NAME(vector_part)(g->c, width);
            NAME(store_part)(out, NAME(gate)(v, NAME(load_part)(dy, width)), width);
        } else
            for (; k < width; k += LANES) {
                k = least(k, width - LANES);
                V d = LOAD(x + k) - NAME(vector)(g->mean + k);
                V v = y ? LOAD(y + k) : d * NAME(vector)(g->a + k) + NAME(vector)(g->c + k);
                STORE(out + k, NAME(gate)(v, LOAD(dy + k)));
            }
    }
    return gated;
}

static inline void NAME(sum_rows)(const T *x, int64_t C, const T *dy, int64_t stride, int rows, int half, int64_t n,
                                  V mean, V *s, V *p)
{
    V sum = {0}, dot = {0};
    for (int i = 0; i < rows; i++) {
        V g = NAME(get)(dy + i * stride, half, n);
        sum += g;
        dot += g * (NAME(get)(x + i * C, half, n) - mean);
    }
    *s += sum;
    *p += dot;
}

static inline void NAME(sum_block)(const T *x, int64_t C, const T *dy, int64_t stride, int64_t width, int rows,
                                   const A *mean, const A *mean2, V *s, V *p)
{
    int64_t c = 0, j = 0;
    for (; c + NAME(PAIR) <= width; c += NAME(PAIR), j += 2) {
        NAME(sum_rows)(x + c, C, dy + c, stride, rows, 0, LANES, NAME(vector)(mean2 + c), s + j, p + j);
        NAME(sum_rows)(x + c, C, dy + c, stride, rows, 1, LANES, NAME(vector)(mean2 + c + LANES), s + j + 1, p + j + 1);
    }
    for (; c < width; c += LANES, j++)
        if (width < LANES)
            NAME(sum_rows)(x, C, dy, stride, rows, 2, width, NAME(vector_part)(mean, width), s, p);
        else {
            int64_t k = least(c, width - LANES);
            NAME(sum_rows)(x + k, C, dy + k, stride, rows, 2, LANES, NAME(vector)(mean + k), s + j, p + j);
        }
}

static void NAME(sums_of_rows)(const struct pass *pass, struct unit u)
{
    int64_t C = pass->C, width = u.c1 - u.c0, stride;
    A copy[CHANNELS];
    const A *mean = (const A *)pass->mean + u.group * C + u.c0, *mean2 = NAME(in_pairs)(mean, width, copy);
    V sum[CHANNELS / LANES], dot[CHANNELS / LANES];
    A sums[CHANNELS], dots[CHANNELS];
    struct NAME(gates) gates;
    NAME(open_gates)(pass, u, &gates);
    size_t used = (size_t)((width + LANES - 1) / LANES) * sizeof(V);
    memset(u.first, 0, (size_t)width * sizeof(double));
    memset(u.second, 0, (size_t)width * sizeof(double));
    for (int64_t leaf = u.n0; leaf < u.n1; leaf += LEAF) {
        int64_t end = least(leaf + LEAF, u.n1), r = leaf;
        memset(sum, 0, used);
        memset(dot, 0, used);
        while (r < end) {
            int rows = end - r >= 8 ? 8 : end - r >= 4 ? 4 : 1;
            const T *x = (const T *)pass->x + r * C + u.c0, *dy = NAME(dy_of_rows)(pass, u, r, rows, 0, &gates, &stride);
            if (rows == 8)
                NAME(sum_block)(x, C, dy, stride, width, 8, mean, mean2, sum, dot);
            else if (rows == 4)
                NAME(sum_block)(x, C, dy, stride, width, 4, mean, mean2, sum, dot);
            else
                NAME(sum_block)(x, C, dy, stride, width, 1, mean, mean2, sum, dot);
            r += rows;
        }
        NAME(in_order)(sum, width, sums);
        NAME(in_order)(dot, width, dots);
        for (int64_t c = 0; c < width; c++) {
            u.first[c] += (double)sums[c];
            u.second[c] += (double)dots[c];
        }
    }
}

static void NAME(gradient_of_rows)(const struct pass *pass, struct unit u)
{
    int64_t C = pass->C, v = u.group * C + u.c0, width = u.c1 - u.c0, stride;
    const A *mean = (const A *)pass->mean + v, *a = (const A *)pass->a + v, *b = (const A *)pass->b + v,
            *c = (const A *)pass->c + v;
    A copies[4][CHANNELS];
    const A *mean2 = NAME(in_pairs)(mean, width, copies[0]), *a2 = NAME(in_pairs)(a, width, copies[1]),
            *b2 = NAME(in_pairs)(b, width, copies[2]), *c2 = NAME(in_pairs)(c, width, copies[3]);
    struct NAME(gates) gates;
    NAME(open_gates)(pass, u, &gates);
    for (int64_t r = u.n0; r < u.n1; r++) {
        const T *x = (const T *)pass->x + r * C + u.c0, *dy = NAME(dy_of_rows)(pass, u, r, 1, 1, &gates, &stride);
        T *out = (T *)pass->out + r * C + u.c0;
        int64_t k = 0, l = LANES;
        for (; k + NAME(PAIR) <= width; k += NAME(PAIR), l += NAME(PAIR)) {
            V d = FIRST(x + k) - NAME(vector)(mean2 + k), e = SECOND(x + k) - NAME(vector)(mean2 + l);
            STORE_PAIR(out + k,
                       FIRST(dy + k) * NAME(vector)(a2 + k) + (d * NAME(vector)(b2 + k) + NAME(vector)(c2 + k)),
                       SECOND(dy + k) * NAME(vector)(a2 + l) + (e * NAME(vector)(b2 + l) + NAME(vector)(c2 + l)));
        }
        if (width < LANES) {
            V g = NAME(load_part)(dy, width), d = NAME(load_part)(x, width) - NAME(vector_part)(mean, width);
            d = d * NAME(vector_part)(b, width) + NAME(vector_part)(c, width);
            NAME(store_part)(out, g * NAME(vector_part)(a, width) + d, width);
        } else
            for (; k < width; k += LANES) {
                k = least(k, width - LANES);
                V d = LOAD(x + k) - NAME(vector)(mean + k);
                STORE(out + k, LOAD(dy + k) * NAME(vector)(a + k) + (d * NAME(vector)(b + k) + NAME(vector)(c + k)));
            }
    }
}

/* --------------------------------------------------------------------------------------------------- the whole passes */

/* Statistics of channels whose parts are all there. */
static void NAME(finish_moments)(const struct pass *pass, int64_t g, int64_t c0, int64_t c1)
{
    int64_t C = pass->C;
    double *first = pass->partial + g * pass->parts * 2 * C, *second = first + C;
    double n = (double)(count(pass, g) * pass->S), part = (double)(pass->part * pass->S), before = part, invn = 1 / n;
    for (int64_t p = 1; p < pass->parts && before < n; p++, before += part) {
        double share = n - before < part ? (n - before) / n : part / (before + part);
        for (int64_t c = c0; c < c1; c++)
            join(first + c, second + c, before, share, first[p * 2 * C + c], second[p * 2 * C + c]);
    }
    A *mean = (A *)pass->mean + g * C, *var = (A *)pass->var + g * C, *std = (A *)pass->std + g * C;
    A eps = (A)pass->eps;
    for (int64_t c = c0; c < c1; c++)
        mean[c] = (A)first[c];
    for (int64_t c = c0; c < c1; c++)
        var[c] = (A)(second[c] * invn);
    for (int64_t c = c0; c < c1; c++)
        std[c] = SQRT(var[c] + eps);
}

static void NAME(moments_of_unit)(const struct pass *pass, struct unit u)
{
    struct found found;
    if (pass->rows)
        NAME(moments_of_rows)(pass, found_in(u, &found));
    else
        NAME(moments_of_planes)(pass, found_in(u, &found));
    hand_over(u, &found);
    if (pass->parts == 1)
        NAME(finish_moments)(pass, u.group, u.c0, u.c1);
}

static int NAME(moments)(struct pass *pass)
{
    pass->partial = malloc((size_t)(pass->groups * pass->parts * 2 * pass->C) * sizeof(double));
    if (!pass->partial)
        return 1;
    every_unit(pass, NAME(moments_of_unit), 0);
    for (int64_t g = 0; pass->parts > 1 && g < pass->groups; g++)
        NAME(finish_moments)(pass, g, 0, pass->C);
    free(pass->partial);
    return 0;
}

static int NAME(affine)(struct pass *pass)
{
    every_unit(pass, pass->rows ? NAME(affine_of_rows) : NAME(affine_of_planes), 1);
    return 0;
}

/* Sums of channels whose parts are all there: of dy and of dy * x_hat, in the first part. */
static void NAME(finish_sums)(const struct pass *pass, int64_t g, int64_t c0, int64_t c1)
{
    int64_t C = pass->C;
    double *restrict first = pass->partial + g * pass->parts * 2 * C, *restrict second = first + C;
    for (int64_t p = 1; p < pass->parts; p++) {
        for (int64_t k = c0; k < c1; k++)
            first[k] += first[p * 2 * C + k];
        for (int64_t k = c0; k < c1; k++)
            second[k] += second[p * 2 * C + k];
    }
    const A *restrict std = (const A *)pass->std + g * C;
    for (int64_t k = c0; k < c1; k++)
        second[k] /= (double)std[k];
}

/* From these sums, or what is given instead, to the coefficients of the gradient. */
static void NAME(coefficients)(const struct pass *pass, int64_t g, int64_t c0, int64_t c1)
{
    int64_t C = pass->C;
    const A *restrict std = (const A *)pass->std + g * C, *restrict scale = (const A *)pass->scale + g * C;
    A *restrict a = (A *)pass->a + g * C, *restrict b = (A *)pass->b + g * C, *restrict c = (A *)pass->c + g * C;
    /* Loops of one statement, which compilers turn into vectors. */
    for (int64_t k = c0; k < c1; k++)
        a[k] = scale[k] / std[k];
    for (int64_t k = c0; pass->weight && k < c1; k++)
        a[k] *= ((const A *)pass->weight)[k];
    const double *restrict first = pass->partial + g * pass->parts * 2 * C, *restrict second = first + C;
    double share = -1.0 / (double)(count(pass, g) * pass->S);
    if (pass->given) {
        enum { SOME = 256 };
        A of_dy[SOME], of_dy_x_hat[SOME], factor[SOME], own = (A)pass->own;
        for (int64_t k0 = c0; k0 < c1; k0 += SOME) {
            int64_t k1 = least(k0 + SOME, c1);
            pass->given(pass->argument, g, k0, k1, of_dy, of_dy_x_hat, factor);
            for (int64_t k = k0; own != 0 && k < k1; k++)
                of_dy[k - k0] -= own * (A)(first[k] * share);
            for (int64_t k = k0; own != 0 && k < k1; k++)
                of_dy_x_hat[k - k0] -= own * (A)(second[k] * share);
            for (int64_t k = k0; k < k1; k++)
                b[k] = -a[k] * (of_dy_x_hat[k - k0] / std[k]);
            for (int64_t k = k0; k < k1; k++)
                c[k] = -a[k] * of_dy[k - k0];
            for (int64_t k = k0; k < k1; k++)
                a[k] *= factor[k - k0];
        }
        return;
    }
    for (int64_t k = c0; k < c1; k++)
        b[k] = a[k] * ((A)(second[k] * share) / std[k]);
    for (int64_t k = c0; k < c1; k++)
        c[k] = a[k] * (A)(first[k] * share);
}

/* Whether the gradient needs no sums: then x and dy are read from memory once. */
static inline int NAME(foreseen)(const struct pass *pass) { return pass->given && pass->own == 0; }

static void NAME(gradient_of_unit)(const struct pass *pass, struct unit u)
{
    if (pass->rows)
        NAME(gradient_of_rows)(pass, u);
    else
        NAME(gradient_of_planes)(pass, u);
}

/* Where a unit is all there is of its channels, or nothing has to be known of the others, its second pass finds it in the
 * cache. */
static void NAME(sums_of_unit)(const struct pass *pass, struct unit u)
{
    struct found found;
    if (pass->rows)
        NAME(sums_of_rows)(pass, found_in(u, &found));
    else
        NAME(sums_of_planes)(pass, found_in(u, &found));
    hand_over(u, &found);
    int all = pass->parts == 1;
    if (all)
        NAME(finish_sums)(pass, u.group, u.c0, u.c1);
    if (all && !NAME(foreseen)(pass))
        NAME(coefficients)(pass, u.group, u.c0, u.c1);
    if (pass->out && (all || NAME(foreseen)(pass)))
        NAME(gradient_of_unit)(pass, u);
}

static int NAME(backward)(struct pass *pass)
{
    int64_t C = pass->C, GC = pass->groups * C, numbers = GC * pass->parts * 2;
    double *memory = malloc((size_t)(numbers + 2 * C) * sizeof(double) + (size_t)(3 * GC) * sizeof(A));
    if (!memory)
        return 1;
    double *weight_grad = memory + numbers, *bias_grad = weight_grad + C;
    pass->partial = memory;
    pass->a = bias_grad + C;
    pass->b = (A *)pass->a + GC;
    pass->c = (A *)pass->a + 2 * GC;
    for (int64_t g = 0; NAME(foreseen)(pass) && g < pass->groups; g++)
        NAME(coefficients)(pass, g, 0, C);
    every_unit(pass, NAME(sums_of_unit), 0);
    for (int64_t g = 0; pass->parts > 1 && g < pass->groups; g++)
        NAME(finish_sums)(pass, g, 0, C);
    if (pass->parts > 1 && !NAME(foreseen)(pass)) {
        for (int64_t g = 0; g < pass->groups; g++)
            NAME(coefficients)(pass, g, 0, C);
        if (pass->out)
            every_unit(pass, NAME(gradient_of_unit), 1);
    }
    if (pass->seen)
        pass->seen(pass->argument, memory, pass->parts * 2 * C);
    memset(weight_grad, 0, (size_t)(2 * C) * sizeof(double));
    for (int64_t g = 0; g < pass->groups; g++) {
        const double *first = memory + g * pass->parts * 2 * C, *second = first + C;
        const A *scale = (const A *)pass->scale + g * C, *shift = (const A *)pass->shift + g * C;
        for (int64_t k = 0; k < C; k++)
            weight_grad[k] += (double)scale[k] * second[k] + (double)shift[k] * first[k];
        for (int64_t k = 0; k < C; k++)
            bias_grad[k] += first[k];
    }
    for (int64_t k = 0; pass->weight_grad && k < C; k++)
        ((A *)pass->weight_grad)[k] = (A)weight_grad[k];
    for (int64_t k = 0; pass->bias_grad && k < C; k++)
        ((A *)pass->bias_grad)[k] = (A)bias_grad[k];
    free(memory);
    return 0;
}

static int NAME(gradient)(struct pass *pass)
{
    every_unit(pass, NAME(gradient_of_unit), 0);
    return 0;
}
