// Normalisation of updates on a CPU at about the speed of memory. Compiled on first use by cpu.py, called through ctypes.
//
// Plain C interface, float32, rows contiguous. Nothing here depends on the number of threads: a matrix is always worked
// on by one thread, in the same order, so results are deterministic.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // floats in the widest register
#else
constexpr int W = 8;
#endif
typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float wide __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr int K = 8;             // power vectors per matrix: spectral_norm.BLOCK
constexpr int R = 8;             // rows at a time: 8 independent sums hide the latency of fused multiply-add
constexpr int ROWS = 16;         // rows at a time that stay in the cache between the two products
constexpr int AHEAD = 2048;      // entries between what is read and what is fetched into the second-level cache
constexpr int64_t FITS = 1 << 20;  // entries of an update and of a weight that the third-level cache holds
constexpr int SQUARINGS = 8;     // spectral_norm.SQUARINGS
constexpr double JITTER = 1e-6;  // spectral_norm.JITTER
constexpr double TINY = 1e-18;   // spectral_norm.TINY
constexpr float CAP = 10.0f;     // runtime.PIECE_CAP

wide read(const float* x) { return *reinterpret_cast<const wide*>(x); }
void write(float* x, wide value) { *reinterpret_cast<wide*>(x) = value; }
void fetch(const float* x) { __builtin_prefetch(x, 0, 2); }

wide root(wide x) {
  float each[W];
  std::memcpy(each, &x, sizeof each);
  for (int i = 0; i < W; ++i) each[i] = std::sqrt(each[i]);
  return read(each);
}

float total(wide x) {
  f8 sum;
  std::memcpy(&sum, &x, sizeof sum);
  if (W == 16) {
    f8 upper;
    std::memcpy(&upper, reinterpret_cast<const char*>(&x) + sizeof sum, sizeof upper);
    sum += upper;
  }
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// v[r] = w[r]·u for N rows w of length c and all K vectors. `beside` is other work, W entries of it for each 32 of w: it
// waits for memory or the divider while this multiplies. (Passed by value: what it holds can stay in registers.)
template <int N, class Beside>
inline Beside images(const float* w, int64_t ld, int64_t c, const float* ut, float* v, Beside beside) {
  f8 sum[N];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) sum[r] = f8{};
  int64_t i = 0;
  for (; i + 4 <= c; i += 4) {
    if (N == R) beside.work();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const f8 u = *reinterpret_cast<const f8*>(ut + K * (i + j));
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) sum[r] += w[r * ld + i + j] * u;
    }
  }
  for (; i < c; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sum[r] += w[r * ld + i] * *reinterpret_cast<const f8*>(ut + K * i);
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) *reinterpret_cast<f8*>(v + K * r) = sum[r];
  return beside;
}

// For some rows w of length c, at most ROWS: v[r] = w[r]·u for all K vectors, z += Σ_r v[r] w[r], squares[r] = |w[r]|².
template <class Beside>
Beside products(const float* w, int64_t ld, int64_t rows, int64_t c, const float* ut, float* v, float* z,
                float* squares, Beside beside) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) beside = images<R>(w + r * ld, ld, c, ut, v + K * r, beside);
  for (; r < rows; ++r) beside = images<1>(w + r * ld, ld, c, ut, v + K * r, beside);
  wide parts[ROWS];
  for (r = 0; r < rows; ++r) parts[r] = wide{};
  int64_t i = 0;
  for (; i + W <= c; i += W) {
    wide sum[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sum[k] = read(z + k * c + i);
    for (r = 0; r < rows; ++r) {
      if (r % 2 == 0) beside.work();
      const wide x = read(w + r * ld + i);
      parts[r] += x * x;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum[k] += x * v[K * r + k];
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) write(z + k * c + i, sum[k]);
  }
  for (r = 0; r < rows; ++r) squares[r] = total(parts[r]);
  for (; i < c; ++i) {
    f8 sum = f8{};
    for (r = 0; r < rows; ++r) {
      const float x = w[r * ld + i];
      squares[r] += x * x;
      sum += x * *reinterpret_cast<const f8*>(v + K * r);
    }
    for (int k = 0; k < K; ++k) z[k * c + i] += sum[k];
  }
  return beside;
}

// The largest eigenvalue of a symmetric, non-negative K×K matrix of trace 1: squared SQUARINGS times, which leaves one
// eigenvector or several whose eigenvalues hardly differ, then the Rayleigh quotient (spectral_norm.largest_eigenvalue).
float largest_eigenvalue(const f8 (&given)[K]) {
  f8 m[K], next[K];
  std::memcpy(m, given, sizeof m);
  for (int round = 0; round < SQUARINGS; ++round) {
    float trace = 0;
    for (int a = 0; a < K; ++a) trace += m[a][a];
    const float scale = 1.0f / (trace * trace);
    for (int a = 0; a < K; ++a) {
      f8 s = f8{};
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) s += m[a][k] * m[k];
      next[a] = s * scale;
    }
    std::memcpy(m, next, sizeof m);
  }
  int best = 0;
  for (int a = 1; a < K; ++a)
    if (m[a][a] > m[best][best]) best = a;
  f8 image = f8{};
  for (int a = 0; a < K; ++a) image += m[best][a] * given[a];
  float above = 0, below = 0;
  for (int a = 0; a < K; ++a) {
    above += image[a] * m[best][a];
    below += m[best][a] * m[best][a];
  }
  return above / below;
}

// Sums of at most this many terms are taken in single precision, and added up in double.
constexpr int64_t CHUNK = 1024;

// Not inlined: GCC 12 at -O3 computes wrong sums where it merges several (tests/test_kernels_cpu.py would notice).
__attribute__((noinline)) double dot(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t start = 0; start < n; start += CHUNK) {
    const int64_t stop = start + CHUNK < n ? start + CHUNK : n;
    wide part = wide{};
    int64_t i = start;
    for (; i + W <= stop; i += W) part += read(a + i) * read(b + i);
    sum += total(part);
    for (; i < stop; ++i) sum += static_cast<double>(a[i]) * b[i];
  }
  return sum;
}

// z [K][c] becomes L⁻¹ z / √t for the Cholesky factor L of gram / t, with its trace t: spectral_norm.whitened.
void whiten(const double (&gram)[K][K], double trace, float* z, int64_t c) {
  double lower[K][K] = {};
  for (int a = 0; a < K; ++a)
    for (int b = 0; b <= a; ++b) {
      double s = gram[a][b] / trace + (a == b ? JITTER : 0.0);
      for (int k = 0; k < b; ++k) s -= lower[a][k] * lower[b][k];
      lower[a][b] = a == b ? std::sqrt(s > JITTER * JITTER ? s : JITTER * JITTER) : s / lower[b][b];
    }
  const float size = static_cast<float>(1.0 / std::sqrt(trace));
  for (int a = 0; a < K; ++a) {  // forward substitution
    float* row = z + a * c;
    for (int64_t i = 0; i < c; ++i) row[i] *= size;
    for (int b = 0; b < a; ++b) {
      const float factor = static_cast<float>(lower[a][b]);
      const float* other = z + b * c;
      for (int64_t i = 0; i < c; ++i) row[i] -= factor * other[i];
    }
    const float scale = static_cast<float>(1.0 / lower[a][a]);
    for (int64_t i = 0; i < c; ++i) row[i] *= scale;
  }
}

// The products of the rows of z [K][c]; returns their trace.
double gram_of(const float* z, int64_t c, double (&gram)[K][K]) {
  double trace = 0;
  for (int a = 0; a < K; ++a)
    for (int b = 0; b <= a; ++b) gram[a][b] = gram[b][a] = dot(z + a * c, z + b * c, c);
  for (int a = 0; a < K; ++a) trace += gram[a][a];
  return trace;
}

// From v = W u (stored [rows][K]) and z = Wᵀ v ([K][c]): the largest singular value of Wᵀ on the span of v. z becomes
// Wᵀ y for an orthonormal basis y of that span, `gram` its products. spectral_norm.ritz has the derivation.
double ritz(const float* v, int64_t rows, float* z, int64_t c, double (&gram)[K][K]) {
  double trace = 0;
  std::memset(gram, 0, sizeof gram);
  for (int64_t start = 0; start < rows; start += CHUNK) {
    const int64_t stop = start + CHUNK < rows ? start + CHUNK : rows;
    f8 part[K];
    for (int a = 0; a < K; ++a) part[a] = f8{};
    for (int64_t i = start; i < stop; ++i) {
      const f8 row = *reinterpret_cast<const f8*>(v + K * i);
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) part[a] += v[K * i + a] * row;
    }
    for (int a = 0; a < K; ++a)
      for (int b = 0; b <= a; ++b) gram[a][b] += part[a][b];
  }
  for (int a = 0; a < K; ++a) trace += gram[a][a];
  if (!(trace > 0) || !std::isfinite(trace)) return std::isfinite(trace) ? 0.0 : NAN;
  whiten(gram, trace, z, c);
  const double size = gram_of(z, c, gram);
  if (!(size > 0) || !std::isfinite(size)) return std::isfinite(size) ? 0.0 : NAN;
  f8 scaled[K];
  for (int a = 0; a < K; ++a)
    for (int b = 0; b < K; ++b) scaled[a][b] = static_cast<float>(gram[a][b] / size);
  return std::sqrt(largest_eigenvalue(scaled) * size);
}

// Memory that starts on a cache line, and only grows.
class Floats {
  struct alignas(64) Line {
    float x[16];
  };
  std::vector<Line> lines;

 public:
  float* fit(int64_t size) {
    if (lines.size() * 16 < static_cast<size_t>(size)) lines.resize((size + 15) / 16);
    return data();
  }
  float* data() { return lines.data()->x; }
};

// Power vectors of one matrix [rows, c] in the making: one step of block power iteration.
struct Iteration {
  Floats space;
  float *ut, *v, *z, *squares;

  void start(const float* u, int64_t rows, int64_t c) {
    const int64_t line = 16, height = (rows + line - 1) / line * line;
    ut = space.fit(2 * K * (c + line) + (K + 1) * height);
    z = ut + K * (c + line) / line * line;
    v = z + K * (c + line) / line * line;
    squares = v + K * height;
    std::memset(z, 0, sizeof(float) * K * c);
    for (int64_t i = 0; i < c; ++i)
      for (int k = 0; k < K; ++k) ut[K * i + k] = u[k * c + i];
  }

  template <class Beside>
  Beside add(const float* w, int64_t ld, int64_t first, int64_t rows, int64_t c, Beside beside) {
    return products(w, ld, rows, c, ut, v + K * first, z, squares + first, beside);
  }

  // The norm; its vectors replace `u`. Entry i of row r of the matrix is w[r·ld + i·step].
  float finish(const float* w, int64_t ld, int64_t step, int64_t rows, int64_t c, float* u, const float* dither,
               float scale) {
    double gram[K][K];
    double found = ritz(v, rows, z, c, gram);
    int64_t longest = 0;
    bool finite = !std::isnan(found);
    for (int64_t r = 0; r < rows; ++r) {
      if (squares[r] > squares[longest]) longest = r;
      finite = finite && std::isfinite(squares[r]);
    }
    if (!finite) return NAN;
    const double row = std::sqrt(static_cast<double>(squares[longest]));
    const bool lost = row > found;
    if (lost) {  // the vectors have lost track: the row is one of them
      for (int64_t i = 0; i < c; ++i) z[i] = w[longest * ld + i * step];
      found = row;
    }
    if (!(found > TINY)) return static_cast<float>(found);
    if (lost) gram_of(z, c, gram);
    double trace = 0;
    for (int a = 0; a < K; ++a) trace += gram[a][a];
    whiten(gram, trace, z, c);
    for (int64_t i = 0; i < K * c; ++i) u[i] = z[i] + scale * dither[i];
    return static_cast<float>(found);
  }
};

// Work beside the products: the rows that come next are fetched.
struct Fetching {
  const float *next, *stop;
  void work() {
    if (next < stop) fetch(next);
    next += W;
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
  inline __attribute__((always_inline)) wide step(const float* g, float* m, float* v) const {
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
struct Updating {
  WideAdam adam;
  const float *g, *later;  // `later`: what is fetched, too
  float *m, *v, *u;
  int64_t width, gap, at = 0, stop = 0, goal = 0;  // done, in this row (all rows, if there is no gap), for now

  inline __attribute__((always_inline)) void work() {
    if (at + W > stop) return;
    fetch(g + at + AHEAD);
    fetch(m + at + AHEAD);
    fetch(v + at + AHEAD);
    fetch(later + at);
    write(u + at, adam.step(g + at, m + at, v + at));
    at += W;
    if (at == stop) turn();
  }

  inline __attribute__((always_inline)) void turn() {
    if (stop == goal) return;
    stop += width;
    g += gap, m += gap, v += gap;
  }

  void aim(int64_t row) {  // after `reach`: work may lead up to this row
    if (row * width == goal) return;
    goal = row * width;
    if (!gap)
      stop = goal;
    else if (at)
      turn();
    else
      stop = width;
  }

  void reach(int64_t row, const Adam& given) {  // work has led up to this row
    aim(row);
    while (at + W <= stop) work();
    entries(given, g + at, m + at, v + at, u + at, goal - at, 1.0f);
    at = goal;
  }
};

}  // namespace

extern "C" {

// What `step_matrices` is told: n parameters, of which a part [groups·rows, c·taps] is worked on; for each group of rows
// and each tap, one matrix [rows, c] with entries `taps` apart.
struct Matrices {
  const float* const* g;
  float *const *m, *const *v, *const *w;  // [n]: addresses of the parts of gradients, averages, squares and weights
  const Adam* adam;                       // [n]
  const float *moves, *kept;              // [n]: a step is kept·w + moves·update / largest norm
  float* vectors;                         // [n, groups·taps, K, c], replaced
  const float* dither;                    // [K, c]
  float dither_size;
  float* norms;  // [n, groups·taps]
  int64_t n, groups, taps, rows, c, ld;
  int guarded;  // whether weights stay as they are where a norm is not finite
};

// One step of block power iteration for `pieces` matrices [rows, c]: `u` [pieces, K, c] is replaced by the new vectors,
// `estimates` [pieces] gets the norms.
void power_step(const float* const* w, int64_t pieces, int64_t ld, int64_t rows, int64_t c, float* u,
                const float* dither, double scale, float* estimates, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Iteration iteration;
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < pieces; ++p) {
      iteration.start(u + p * K * c, rows, c);
      for (int64_t r = 0; r < rows; r += ROWS) {
        const int64_t count = r + ROWS < rows ? ROWS : rows - r;
        Fetching next{w[p] + (r + ROWS) * ld, w[p] + rows * ld};
        iteration.add(w[p] + r * ld, ld, r, count, c, next);
      }
      estimates[p] = iteration.finish(w[p], ld, 1, rows, c, u + p * K * c, dither, static_cast<float>(scale));
    }
  }
}

// A whole step of n parameters, each while it is in the cache: AdamW's update, its norms, and the step itself.
void step_matrices(const Matrices* given, int threads) {
  const Matrices& t = *given;
  const int64_t pieces = t.groups * t.taps, width = t.c * t.taps, rows = t.groups * t.rows;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Iteration> iterations(pieces);
    static thread_local Floats space;  // kept: fresh memory would have to be mapped in every step
    float* update = space.fit(rows * width);
    Floats others;
    float *tap = others.fit(ROWS * (t.c + 16) + width), *factors = tap + ROWS * (t.c + 16);
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < t.n; ++p) {
      float *vectors = t.vectors + p * pieces * K * t.c, *norms = t.norms + p * pieces;
      for (int64_t i = 0; i < pieces; ++i) iterations[i].start(vectors + i * K * t.c, t.rows, t.c);
      const float* later = rows * width > FITS ? t.g[p] : t.w[p];
      Updating next{WideAdam(t.adam[p]), t.g[p], later, t.m[p], t.v[p], update, width, t.ld - width};
      next.reach(ROWS < t.rows ? ROWS : t.rows, t.adam[p]);
      for (int64_t first = 0; first < rows; first += t.rows)
        for (int64_t r = 0; r < t.rows; r += ROWS) {
          const int64_t stop = r + ROWS < t.rows ? r + ROWS : t.rows;
          const int64_t ahead = first + stop + ROWS < rows ? first + stop + ROWS : rows;
          const float* w = update + (first + r) * width;
          next.aim(ahead);
          for (int64_t k = 0; k < t.taps; ++k) {
            if (t.taps > 1)
              for (int64_t i = 0; i < (stop - r) * t.c; ++i) tap[i] = w[i * t.taps + k];
            Iteration& iteration = iterations[first / t.rows * t.taps + k];
            next = iteration.add(t.taps > 1 ? tap : w, t.c, r, stop - r, t.c, next);
          }
          next.reach(ahead, t.adam[p]);
        }
      float largest = 0;
      for (int64_t i = 0; i < pieces; ++i) {
        const float* w = update + i / t.taps * t.rows * width + i % t.taps;
        norms[i] = iterations[i].finish(w, width, t.taps, t.rows, t.c, vectors + i * K * t.c, t.dither, t.dither_size);
        if (!(norms[i] <= largest) && !std::isnan(largest)) largest = norms[i];
      }
      if (t.guarded && !std::isfinite(largest)) continue;
      for (int64_t r = rows; r-- > 0;) {  // backwards: the last rows are nearest
        if ((r + 1) % t.rows == 0)
          for (int64_t i = 0; i < width; ++i) {
            const float norm = norms[r / t.rows * t.taps + i % t.taps], floor = largest / CAP;
            factors[i] = largest <= TINY ? 0.0f : -t.moves[p] / (norm > floor ? norm : floor);
          }
        float* weight = t.w[p] + r * t.ld;
        const float *u = update + r * width, kept = t.kept[p];
        int64_t i = 0;
        for (; i + W <= width; i += W) {
          fetch(weight + i - AHEAD);
          fetch(u + i - AHEAD);
          write(weight + i, kept * read(weight + i) + read(factors + i) * read(u + i));
        }
        for (; i < width; ++i) weight[i] = kept * weight[i] + factors[i] * u[i];
      }
    }
  }
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
  uint32_t largest = 0;  // bits of floats that are not negative are in the same order, NaN above infinity
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : largest)
  for (int64_t p = 0; p < tensors; ++p) {
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(x[p]);
    uint32_t best[64] = {};
    int64_t i = 0;
    for (; i + 64 <= sizes[p]; i += 64) {
      for (int j = 0; j < 64; j += 16) fetch(x[p] + i + j + AHEAD);
      for (int j = 0; j < 64; ++j) best[j] = std::max(best[j], bits[i + j] & 0x7fffffffu);
    }
    for (; i < sizes[p]; ++i) best[0] = std::max(best[0], bits[i] & 0x7fffffffu);
    largest = std::max(largest, *std::max_element(best, best + 64));
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
  for (int64_t p = 0; p < tensors; ++p)
    for (int64_t r = 0; r < rows; ++r) {
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
