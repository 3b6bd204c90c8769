// Normalisation of updates on a CPU at about the speed of memory. Compiled on first use by cpu.py, called through ctypes.
//
// Plain C interface, float32, rows contiguous. Nothing here depends on the number of threads: a matrix is always worked
// on by one thread, in the same order, so results are deterministic.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float f16 __attribute__((vector_size(64), aligned(4), may_alias));

constexpr int K = 8;             // power vectors per matrix: spectral_norm.BLOCK
constexpr int R = 8;             // rows at a time: 8 independent sums hide the latency of fused multiply-add
constexpr int SQUARINGS = 8;     // spectral_norm.SQUARINGS
constexpr double JITTER = 1e-6;  // spectral_norm.JITTER
constexpr double TINY = 1e-18;   // spectral_norm.TINY

float total(f16 x) {
  float half[16];
  std::memcpy(half, &x, sizeof half);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) half[i] += half[i + width];
  return half[0];
}

// For N rows w of length c: v[r] = w[r]·u for all K vectors, z += Σ_r v[r] w[r], squares[r] = |w[r]|². The rows stay in
// the first-level cache between the two products, so that memory is read once.
template <int N>
void products(const float* w, int64_t ld, int64_t c, const float* ut, float* v, float* z, float* squares) {
  f8 sum[N];
  for (int r = 0; r < N; ++r) sum[r] = f8{};
  for (int64_t i = 0; i < c; ++i) {
    const f8 u = *reinterpret_cast<const f8*>(ut + K * i);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sum[r] += w[r * ld + i] * u;
  }
  for (int r = 0; r < N; ++r) *reinterpret_cast<f8*>(v + K * r) = sum[r];

  f16 square[N];
  for (int r = 0; r < N; ++r) square[r] = f16{};
  int64_t i = 0;
  for (; i + 16 <= c; i += 16) {
    f16 x[N];
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) {
      x[r] = *reinterpret_cast<const f16*>(w + r * ld + i);
      square[r] += x[r] * x[r];
      __builtin_prefetch(w + (N + r) * ld + i);
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      f16 s = *reinterpret_cast<const f16*>(z + j * c + i);
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) s += x[r] * v[K * r + j];
      *reinterpret_cast<f16*>(z + j * c + i) = s;
    }
  }
  for (int r = 0; r < N; ++r) squares[r] = total(square[r]);
  for (; i < c; ++i)
    for (int r = 0; r < N; ++r) {
      squares[r] += w[r * ld + i] * w[r * ld + i];
      for (int j = 0; j < K; ++j) z[j * c + i] += w[r * ld + i] * v[K * r + j];
    }
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
    f16 part = f16{};
    int64_t i = start;
    for (; i + 16 <= stop; i += 16)
      part += *reinterpret_cast<const f16*>(a + i) * *reinterpret_cast<const f16*>(b + i);
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

struct Scratch {
  std::vector<float> ut, v, z, squares;
  void fit(int64_t rows, int64_t c) {
    ut.resize(K * c);
    z.resize(K * c);
    v.resize(K * rows);
    squares.resize(rows);
  }
};

// torch.optim.AdamW's update of lr 1 without weight decay, for `n` entries, in torch's order of operations.
struct Adam {
  float beta1, beta2, eps, step_size, inverse_root, sign;
  void rows(const float* __restrict g, float* __restrict m, float* __restrict v, float* __restrict u, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = sign * g[i];
      m[i] += (1.0f - beta1) * (gradient - m[i]);
      v[i] = beta2 * v[i] + (1.0f - beta2) * gradient * gradient;
      u[i] = -step_size * m[i] / (std::sqrt(v[i]) * inverse_root + eps);
    }
  }
};

void step_one(const float* w, int64_t ld, int64_t rows, int64_t c, float* u, const float* dither, double scale,
              float* estimate, Scratch& s) {
  s.fit(rows, c);
  for (int64_t i = 0; i < c; ++i)
    for (int j = 0; j < K; ++j) s.ut[K * i + j] = u[j * c + i];
  std::memset(s.z.data(), 0, sizeof(float) * K * c);
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    products<R>(w + i * ld, ld, c, s.ut.data(), s.v.data() + K * i, s.z.data(), s.squares.data() + i);
  for (; i < rows; ++i)
    products<1>(w + i * ld, ld, c, s.ut.data(), s.v.data() + K * i, s.z.data(), s.squares.data() + i);
  double gram[K][K];
  double found = ritz(s.v.data(), rows, s.z.data(), c, gram);
  int64_t longest = 0;
  bool finite = true;
  for (int64_t r = 0; r < rows; ++r) {
    if (s.squares[r] > s.squares[longest]) longest = r;
    finite = finite && std::isfinite(s.squares[r]);
  }
  const double row = std::sqrt(static_cast<double>(s.squares[longest]));
  if (!finite || std::isnan(found)) found = NAN;
  const bool lost = row > found;
  if (lost) {  // the vectors have lost track: the row is one of them
    std::memcpy(s.z.data(), w + longest * ld, sizeof(float) * c);
    found = row;
  }
  *estimate = static_cast<float>(found);
  if (!(found > TINY)) return;
  if (lost) gram_of(s.z.data(), c, gram);
  double trace = 0;
  for (int a = 0; a < K; ++a) trace += gram[a][a];
  whiten(gram, trace, s.z.data(), c);
  for (int64_t k = 0; k < K * c; ++k) u[k] = s.z[k] + static_cast<float>(scale) * dither[k];
}

}  // namespace

extern "C" {

// One step of block power iteration for `pieces` matrices [rows, c]: `u` [pieces, K, c] is replaced by the new vectors,
// `estimates` [pieces] gets the norms.
void power_step(const float* const* w, int64_t pieces, int64_t ld, int64_t rows, int64_t c, float* u,
                const float* dither, double scale, float* estimates, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Scratch s;
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < pieces; ++p)
      step_one(w[p], ld, rows, c, u + p * K * c, dither, scale, estimates + p, s);
  }
}

// AdamW's updates `w` from gradients `g`, for tensors of `size` entries.
void adamw(const float* const* g, float* const* m, float* const* v, float* const* w, const float* step_sizes,
           const float* inverse_roots, float beta1, float beta2, float eps, float sign, int64_t tensors, int64_t size,
           int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t p = 0; p < tensors; ++p)
    Adam{beta1, beta2, eps, step_sizes[p], inverse_roots[p], sign}.rows(g[p], m[p], v[p], w[p], size);
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
