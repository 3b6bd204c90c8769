// Normalisation of updates on a CPU at about the speed of memory. Compiled on first use by cpu.py, called through ctypes.
//
// Plain C interface, float32, rows contiguous. Nothing here depends on the number of threads: a matrix is always worked
// on by one thread, in the same order, so results are deterministic.

#include "power.hpp"

namespace {

constexpr int AHEAD = 2048;   // entries between what is read and what is fetched into the second-level cache
constexpr int NEAR = 512;     // the same, where nothing else is done with it
constexpr int SMALL = 16384;  // entries of a tensor that is fetched while the one before it is read
constexpr float CAP = 10.0f;  // runtime.PIECE_CAP

typedef uint32_t bits __attribute__((vector_size(4 * W), aligned(4), may_alias));

#ifdef __AVX512DQ__
// Square roots by a Newton step from an estimate of 14 bits, right to one rounding: the divider is needed for more.
INLINE wide root(wide given) {
  const __m512 x = reinterpret_cast<__m512>(given), estimate = _mm512_rsqrt14_ps(x), near = _mm512_mul_ps(x, estimate);
  const __m512 half = _mm512_mul_ps(estimate, _mm512_set1_ps(0.5f));
  const __m512 better = _mm512_fmadd_ps(_mm512_fnmadd_ps(near, near, x), half, near);
  const __mmask16 itself = _mm512_fpclass_ps_mask(x, 0x0e);  // 0, -0, infinity
  return reinterpret_cast<wide>(_mm512_mask_mov_ps(better, itself, x));
}
#else
wide root(wide x) {
  float each[W];
  std::memcpy(each, &x, sizeof each);
  for (int i = 0; i < W; ++i) each[i] = std::sqrt(each[i]);
  return read(each);
}
#endif

// Work beside the products: rows that come next are fetched, and vectors with the place of those that follow them. All
// of it at one pace: more fetches at once than a core keeps open make it wait.
struct Fetching {
  const float *next, *stop, *u, *last;
  float* fresh;

  INLINE void work() {
    if (next < stop) fetch(next);
    if (u < last) fetch(u), __builtin_prefetch(fresh, 1, 2);
    next += W, u += W, fresh += W;
  }
};

// One step of torch.optim.AdamW with lr 1 and without weight decay: update = scale · average / (√square + eps), where
// `scale` and `eps` hold the corrections of both averages.
struct Adam {
  float beta1, beta2, eps, sign, scale;
};

struct WideAdam {
  wide rest1, beta2, rest2, eps, sign;

  explicit WideAdam(const Adam& x)
      : rest1(wide{} + (1.0f - x.beta1)), beta2(wide{} + x.beta2), rest2(wide{} + (1.0f - x.beta2)), eps(wide{} + x.eps),
        sign(wide{} + x.sign) {}

  // Moves W entries of the averages on; returns the update without `scale`.
  INLINE wide step(const float* g, float* m, float* v) const {
    const wide gradient = read(g), average = read(m) + rest1 * (sign * gradient - read(m));
    const wide square = beta2 * read(v) + rest2 * gradient * gradient;
    write(m, average);
    write(v, square);
    return average / (root(square) + eps);
  }
};

// AdamW's updates, times `scale`, of n entries.
void entries(const Adam& given, const float* g, float* m, float* v, float* u, int64_t n, float scale) {
  const WideAdam adam(given);
  int64_t i = 0;
  for (; i + W <= n; i += W) write(u + i, scale * adam.step(g + i, m + i, v + i));
  if (i == n) return;
  float x[3][W] = {};
  const int64_t size = sizeof(float) * (n - i);
  std::memcpy(x[0], g + i, size), std::memcpy(x[1], m + i, size), std::memcpy(x[2], v + i, size);
  const wide last = scale * adam.step(x[0], x[1], x[2]);
  std::memcpy(m + i, x[1], size), std::memcpy(v + i, x[2], size), std::memcpy(u + i, &last, size);
}

// AdamW's updates `u` of a part [rows, width] of a tensor, whose rows are `gap` entries apart, as work beside products.
// All of it is inlined: its members live in registers, which a store to memory of floats cannot change.
struct Updating {
  WideAdam adam;
  const float* g;
  float *m, *v, *u;
  int64_t width, gap, at = 0, stop = 0, goal = 0;  // done, in this row (all rows, if there is no gap), for now

  INLINE void work() {
    if (at + W > stop) return;
    fetch(g + at + AHEAD);
    fetch(m + at + AHEAD);
    fetch(v + at + AHEAD);
    write(u + at, adam.step(g + at, m + at, v + at));
    at += W;
    if (at == stop) turn();
  }

  INLINE void turn() {
    if (stop == goal) return;
    stop += width;
    g += gap, m += gap, v += gap;
  }

  INLINE void aim(int64_t row) {  // after `reach`: work may lead up to this row
    if (row * width == goal) return;
    goal = row * width;
    if (!gap)
      stop = goal;
    else if (at)
      turn();
    else
      stop = width;
  }

  INLINE void reach(int64_t row, const Adam& given) {  // work has led up to this row
    aim(row);
    while (at + W <= stop) work();
    entries(given, g + at, m + at, v + at, u + at, goal - at, 1.0f);
    at = goal;
  }
};

// The largest magnitude of n entries, as bits: those of floats that are not negative are in the same order, NaN above
// infinity. Memory answers several streams faster than one; what begins at `ahead` is fetched at the same pace.
template <int STREAMS>
uint32_t most(const float* x, int64_t n, const float* ahead) {
  const int64_t part = n / (STREAMS * W) * W;
  bits best[STREAMS] = {};
  for (int64_t i = 0; i < part; i += W)
#pragma GCC unroll 8
    for (int s = 0; s < STREAMS; ++s) {
      fetch(ahead + s * part + i);
      const bits found = *reinterpret_cast<const bits*>(x + s * part + i) & 0x7fffffffu;
      best[s] = found > best[s] ? found : best[s];
    }
  uint32_t largest = 0;
  for (int s = 0; s < STREAMS; ++s)
    for (int j = 0; j < W; ++j) largest = std::max(largest, best[s][j]);
  for (int64_t i = STREAMS * part; i < n; ++i) {
    uint32_t found;
    std::memcpy(&found, x + i, sizeof found);
    largest = std::max(largest, found & 0x7fffffffu);
  }
  return largest;
}

}  // namespace

extern "C" {

// What `step_matrices` is told: n parameters, of which a part [groups·rows, blocks·c·taps] is worked on; for each group
// of rows, block of columns and tap one matrix [rows, c] with entries `taps` apart. Blocks are normalised apart from each
// other.
struct Matrices {
  const float* const* g;
  float *const *m, *const *v, *const *w;  // [n]: addresses of the parts of gradients, averages, squares and weights
  const Adam* adam;                       // [n]
  const float *moves, *kept;              // [n, blocks]: a step is kept·w + moves·update / largest norm
  float* const* vectors;                  // [blocks]: [n, groups·taps, K, c], replaced
  const float* dither;                    // [K, c]
  float dither_size;
  float* norms;  // [n, blocks, groups·taps]
  int64_t n, groups, blocks, taps, rows, c, ld;
  int guarded;  // whether weights stay as they are where a norm is not finite
};

// The step of parameter p from its update: of the pieces of a block, with these norms, none is scaled by more than CAP
// times the factor of the largest. Rows come from two places in turn where factors are the same for all of them:
// memory answers that faster.
static void apply(const Matrices& t, int64_t p, const float* update, const float* norms, const float* largest,
                  float* factors) {
  const int64_t span = t.c * t.taps, width = t.blocks * span, pieces = t.groups * t.taps, rows = t.groups * t.rows;
  const int64_t streams = t.groups == 1 && rows % 2 == 0 ? 2 : 1;
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t r = k % streams * (rows / streams) + k / streams;
    for (int64_t b = 0; b < t.blocks; ++b) {
      float* factor = factors + b * span;
      if (k % t.rows == 0)
        for (int64_t i = 0; i < span; ++i) {
          const float norm = norms[b * pieces + r / t.rows * t.taps + i % t.taps], floor = largest[b] / CAP;
          factor[i] = largest[b] <= TINY ? 0.0f : -t.moves[p * t.blocks + b] / (norm > floor ? norm : floor);
        }
      const float kept = t.kept[p * t.blocks + b];
      float* weight = t.w[p] + r * t.ld + b * span;
      const float* u = update + r * width + b * span;
      int64_t i = 0;
      for (; i + W <= span; i += W) {
        fetch(weight + t.ld + i);
        write(weight + i, kept * read(weight + i) + read(factor + i) * read(u + i));
      }
      for (; i < span; ++i) weight[i] = kept * weight[i] + factor[i] * u[i];
    }
  }
}

// One step of block power iteration for `pieces` matrices [rows, c], `apart` entries from one to the next: the vectors
// that follow `u` [pieces, K, c] become `fresh`, `estimates` [pieces] gets the norms.
void power_step(const float* w, int64_t pieces, int64_t apart, int64_t ld, int64_t rows, int64_t c, const float* u,
                float* fresh, const float* dither, double scale, float* estimates, int threads) {
  const int64_t batch = together(pieces, K * c, threads), blocks = (rows + ROWS - 1) / ROWS;
  const int64_t size = K * c, share = whole(size, W * blocks) / blocks;  // of vectors, and for each block of rows
#pragma omp parallel num_threads(threads)
  {
    static thread_local Iterations iterations;
    iterations.fit(batch, rows, c);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < pieces; first += batch) {
      const int64_t some = std::min(batch, pieces - first);
      Pages pages{w + first * apart, w + (pieces - 1) * apart + rows * ld};
      Pages before{u + first * K * c, u + pieces * K * c}, after{fresh + first * K * c, fresh + pieces * K * c};
      for (int64_t i = 0; i < some; ++i) {
        const int64_t p = first + i;
        const float* matrix = w + p * apart;
        iterations.start(i, u + p * K * c, fresh + p * K * c, estimates + p, rows, c);
        iterations[i].w = matrix, iterations[i].gap = ld, iterations[i].step = 1;
        before.reach(u + p * K * c);
        after.reach(fresh + p * K * c);
        for (int64_t r = 0; r < rows; r += ROWS) {
          const int64_t count = std::min<int64_t>(ROWS, rows - r), block = r / ROWS + 2, that = p + block / blocks;
          pages.reach(matrix + r * ld);
          Fetching beside = {w + that * apart + block % blocks * ROWS * ld};  // the second block from here
          beside.stop = that < pieces ? beside.next + ROWS * ld : beside.next;
          const int64_t from = (p + 1) * size + std::min(size, r / ROWS * share);
          beside.u = u + from, beside.fresh = fresh + from;
          beside.last = u + std::min({from + share, (p + 2) * size, pieces * size});
          iterations[i].products.add(matrix + r * ld, ld, r, count, c, beside);
        }
      }
      iterations.finish(some, rows, c, dither, static_cast<float>(scale));
    }
  }
}

// A whole step of n parameters, each while it is in the cache: AdamW's update, its norms, and the step itself.
void step_matrices(const Matrices* given, int threads) {
  const Matrices& t = *given;
  const int64_t pieces = t.groups * t.taps, span = t.c * t.taps, width = t.blocks * span, rows = t.groups * t.rows;
  const int64_t each = t.blocks * pieces, batch = together(t.n, rows * width, threads);
  const int64_t block = ROWS * t.ld + AHEAD;
  const auto touch = [&](int64_t p, int64_t x, int64_t stop) INLINED {  // entries of all four: see Pages
    if (p == t.n) return;
    for (; x < std::min(stop, rows * t.ld); x += Pages::PAGE)
      fetch(t.g[p] + x), fetch(t.m[p] + x), fetch(t.v[p] + x), fetch(t.w[p] + x);
  };
#pragma omp parallel num_threads(threads)
  {
    static thread_local Iterations iterations;
    static thread_local Floats space, others;
    iterations.fit(batch * each, t.rows, t.c);
    float* updates = space.fit(batch * rows * width);
    float *tap = others.fit(ROWS * (t.c + 16) + width + t.blocks), *factors = tap + ROWS * (t.c + 16);
    float* largest = factors + width;
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < t.n; start += batch) {
      const int64_t some = std::min(batch, t.n - start);
      for (int64_t p = start; p < start + some; ++p) {
        float* update = updates + (p - start) * rows * width;
        const int64_t mine = (p - start) * each;
        for (int64_t b = 0; b < t.blocks; ++b)
          for (int64_t i = 0; i < pieces; ++i) {
            float* u = t.vectors[b] + (p * pieces + i) * K * t.c;
            const int64_t at = mine + b * pieces + i;
            iterations.start(at, u, u, t.norms + p * each + b * pieces + i, t.rows, t.c);
            iterations[at].w = update + i / t.taps * t.rows * width + b * span + i % t.taps;
            iterations[at].gap = width, iterations[at].step = t.taps;
          }
        if (p == start) touch(p, 0, block);
        Updating next{WideAdam(t.adam[p]), t.g[p], t.m[p], t.v[p], update, width, t.ld - width};
        next.reach(ROWS < t.rows ? ROWS : t.rows, t.adam[p]);
        for (int64_t first = 0; first < rows; first += t.rows)
          for (int64_t r = 0; r < t.rows; r += ROWS) {
            const int64_t stop = r + ROWS < t.rows ? r + ROWS : t.rows;
            const int64_t ahead = first + stop + ROWS < rows ? first + stop + ROWS : rows;
            next.aim(ahead);
            if (first + stop < rows)
              touch(p, (first + r) * t.ld + block, (first + stop) * t.ld + block);
            else
              touch(p + 1, 0, block);
            for (int64_t k = 0; k < t.blocks * t.taps; ++k) {
              const int64_t b = k / t.taps, at = k % t.taps;
              const float* w = update + (first + r) * width + b * span;
              int64_t gap = width;
              if (t.taps > 1) {
                for (int64_t j = 0; j < stop - r; ++j)
                  for (int64_t i = 0; i < t.c; ++i) tap[j * t.c + i] = w[j * width + i * t.taps + at];
                w = tap, gap = t.c;
              }
              Products& products = iterations[mine + b * pieces + first / t.rows * t.taps + at].products;
              next = products.add(w, gap, r, stop - r, t.c, next);
            }
            next.reach(ahead, t.adam[p]);
          }
      }
      iterations.finish(some * each, t.rows, t.c, t.dither, t.dither_size);
      for (int64_t p = start; p < start + some; ++p) {
        const float* norms = t.norms + p * each;
        bool finite = true;
        for (int64_t b = 0; b < t.blocks; ++b) {
          largest[b] = 0;
          for (const float* norm = norms + b * pieces; norm < norms + (b + 1) * pieces; ++norm)
            if (!(*norm <= largest[b]) && !std::isnan(largest[b])) largest[b] = *norm;
          finite = finite && std::isfinite(largest[b]);
        }
        if (!t.guarded || finite) apply(t, p, updates + (p - start) * rows * width, norms, largest, factors);
      }
    }
  }
}

// The factors of n updates with so many pieces, from their targets and their norms over `unit`: runtime.factors. They may
// take the place of the norms.
void piece_factors(const float* norms, const float* targets, float* factors, int64_t n, int64_t pieces, float unit) {
  for (int64_t i = 0; i < n; ++i, norms += pieces, factors += pieces) {
    float largest = unit * norms[0];
    for (int64_t k = 1; k < pieces; ++k)
      if (const float norm = unit * norms[k]; !(norm <= largest) && !std::isnan(largest)) largest = norm;
    const float floor = largest / CAP;
    for (int64_t k = 0; k < pieces; ++k)
      factors[k] = !std::isfinite(largest) ? NAN : largest > TINY ? targets[i] / std::max(unit * norms[k], floor) : 0.0f;
  }
}

// `power_step` and the `factors` [pieces] of the matrices, each an update of its own.
void matrix_factors(const float* w, int64_t pieces, int64_t apart, int64_t ld, int64_t rows, int64_t c, const float* u,
                    float* fresh, const float* dither, const float* targets, float unit, double scale, float* factors,
                    int threads) {
  power_step(w, pieces, apart, ld, rows, c, u, fresh, dither, scale, factors, threads);
  piece_factors(factors, targets, factors, pieces, 1, unit);
}

// Adds 1 to n numbers; `found` is what they are then.
void count(float* const* numbers, int64_t n, float* found) {
  for (int64_t i = 0; i < n; ++i) found[i] = *numbers[i] += 1.0f;
}

// AdamW's updates `w` from gradients `g`, for tensors of `size` entries.
void adamw(const float* const* g, float* const* m, float* const* v, float* const* w, const Adam* adam, int64_t tensors,
           int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t p = 0; p < tensors; ++p) entries(adam[p], g[p], m[p], v[p], w[p], size, adam[p].scale);
}

// The largest magnitude in the tensors x[p] of sizes[p] entries; NaN if there is one.
float largest_entry(const float* const* x, const int64_t* sizes, int64_t tensors, int threads) {
  uint32_t largest = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : largest)
  for (int64_t p = 0; p < tensors; ++p) {
    const float* next = p + 1 < tensors ? x[p + 1] : x[p];
    const uint32_t found = sizes[p] < SMALL ? most<1>(x[p], sizes[p], next) : most<8>(x[p], sizes[p], x[p] + NEAR);
    largest = std::max(largest, found);
  }
  float found;
  std::memcpy(&found, &largest, sizeof found);
  return found;
}

// weights[p] = decay · weights[p] + factor · updates[p] for tensors [rows, c], with a factor and a decay for each row,
// or for each column.
void scale_apply(float* const* weights, const float* const* updates, int64_t tensors, int64_t rows, int64_t c,
                 const float* factors, const float* decays, int by_column, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t p = 0; p < tensors; ++p) {
    Pages before{weights[p], weights[p] + rows * c}, change{updates[p], updates[p] + rows * c};
    for (int64_t r = 0; r < rows; ++r) {
      before.reach(weights[p] + r * c);
      change.reach(updates[p] + r * c);
      float* __restrict weight = weights[p] + r * c;
      const float* __restrict update = updates[p] + r * c;
      if (by_column) {
        const float* __restrict factor = factors + p * c;
        const float* __restrict decay = decays + p * c;
        for (int64_t i = 0; i < c; ++i) weight[i] = decay[i] * weight[i] + factor[i] * update[i];
      } else {
        const float factor = factors[p * rows + r], decay = decays[p * rows + r];
        for (int64_t i = 0; i < c; ++i) weight[i] = decay * weight[i] + factor * update[i];
      }
    }
  }
}
}
