// Both products of block power iteration, v = W u and z = Wᵀ v, from one reading of a matrix W: see power.hpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace {

#ifdef __AVX512F__
constexpr int W = 16;  // floats in the widest register
#else
constexpr int W = 8;
#endif
typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float wide __attribute__((vector_size(4 * W), aligned(4), may_alias));

constexpr int K = 8;      // power vectors per matrix: spectral_norm.BLOCK
constexpr int R = 8;      // rows at a time: independent sums hide the latency of fused multiply-add
constexpr int ROWS = 16;  // rows at a time that stay in the cache between the two products

wide read(const float* x) { return *reinterpret_cast<const wide*>(x); }
void write(float* x, wide value) { *reinterpret_cast<wide*>(x) = value; }
f8 read8(const float* x) { return *reinterpret_cast<const f8*>(x); }
void write8(float* x, f8 value) { *reinterpret_cast<f8*>(x) = value; }
INLINE void fetch(const float* x) { __builtin_prefetch(x, 0, 2); }
int64_t whole(int64_t size, int64_t part) { return (size + part - 1) / part * part; }

f8 folded(wide x) {
  f8 sum;
  std::memcpy(&sum, &x, sizeof sum);
  if (W == 16) {
    f8 upper;
    std::memcpy(&upper, reinterpret_cast<const char*>(&x) + sizeof x - sizeof sum, sizeof upper);
    sum += upper;
  }
  return sum;
}

float total(wide x) {
  const f8 sum = folded(x);
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// The totals of at most 16 sums.
template <int N>
INLINE void totals(const wide (&sum)[N], float* found) {
#ifdef __AVX512F__
  __m512 x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = i < N ? reinterpret_cast<__m512>(sum[i]) : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2)
    x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[i], x[i + 1]), _mm512_unpackhi_ps(x[i], x[i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = reinterpret_cast<__m512d>(x[i]), b = reinterpret_cast<__m512d>(x[i + 2]);
    const __m512d lower = _mm512_unpacklo_pd(a, b), upper = _mm512_unpackhi_pd(a, b);
    x[i] = _mm512_add_ps(reinterpret_cast<__m512>(lower), reinterpret_cast<__m512>(upper));
  }
  const auto halved = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  _mm512_storeu_ps(found, halved(halved(x[0], x[4]), halved(x[8], x[12])));
#else
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) found[i] = total(sum[i]);
#endif
}

// Memory that is about to be read. Finding a page takes about as long as reading it, but many are found in the time of
// one: so they are touched BURST entries at a time, one or two bursts before they are read. (GCC takes what does nothing
// but fetch for something without effect, and leaves out calls to it: it has to be inlined.)
struct Pages {
  static constexpr int64_t PAGE = 1024, BURST = 32 * PAGE;
  const float *at, *stop;

  INLINE void reach(const float* x) {
    if (at < x) at = x;
    while (at < stop && at < x + BURST)
      for (const float* end = at + BURST; at < end; at += PAGE) fetch(at);
  }
};

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

// Both products --------------------------------------------------------------------------------------------------------
//
// `Products` holds the power vectors of one matrix [rows, c] and what becomes of them:
//   start   takes the vectors u [K][c]; `scratch` is used within `add` only;
//   add     for some rows w, at most ROWS: v[r] = w[r]·u for all K vectors, z += Σ_r v[r] w[r], squares[r] = |w[r]|²;
//   gram    Σ_r v[r] v[r]ᵀ.
// `beside` is other work, W entries of it for each 16 of w: it waits for memory or the divider while this multiplies.
// (Passed by value: what it holds can stay in registers.) z [K][ld] and `squares` end in zeros up to a whole register.

#if defined(__AVX512BF16__) && !defined(SINGLE)

// Rounded to bfloat16, with float32 sums: an instruction multiplies twice as many. Each entry of the matrix is wrong by at most
// 2⁻⁹ of itself, all independently; so is its norm at most, and of more than a few entries hardly at all. The norm is
// that of the rounded matrix, to float32's precision: v is rounded before anything is made of it.
struct Products {
  static constexpr int64_t PART = 512, GAP = PART / 2 + 16;  // columns at a time; pairs from row to row of them

  float *z, *squares;
  int64_t ld;
  uint32_t *ut, *block, *vp;  // pairs of bfloat16: [ld/2][K] of u; of some rows [parts][ROWS][GAP]; of v [rows/2][K]

  static int64_t size(int64_t rows, int64_t c) {
    const int64_t ld = whole(c, 32), height = whole(rows, ROWS);
    return K * ld + height + K * ld / 2 + K * height / 2;
  }

  static int64_t scratch(int64_t c) { return (c + PART - 1) / PART * ROWS * GAP; }

  void start(float* space, float* scratch, const float* u, int64_t rows, int64_t c) {
    ld = whole(c, 32);
    const int64_t height = whole(rows, ROWS);
    z = space;
    squares = z + K * ld;
    ut = reinterpret_cast<uint32_t*>(squares + height);
    vp = ut + K * ld / 2;
    block = reinterpret_cast<uint32_t*>(scratch);
    std::memset(z, 0, sizeof(float) * K * ld);
    for (int64_t i = 0; i < ld; i += 16) {  // 8 pairs of each vector, transposed
      const __mmask16 inside = mask(c - i);
      __m256i x[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
        x[k] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, u + k * c + i)));
      transpose(x);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) _mm256_store_si256(reinterpret_cast<__m256i*>(ut + K * (i / 2 + k)), x[k]);
    }
  }

  static __mmask16 mask(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

  static void transpose(__m256i (&x)[8]) {
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
      a[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
        b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
      x[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
  }

  // Two rows of `count` entries, of which `inside` are there, as pairs.
  static void round(const float* upper, const float* lower, int64_t inside, int64_t count, uint32_t* to,
                    __m512 (&squares)[2]) {
    __m512 first = squares[0], second = squares[1];
    auto both = [&](int64_t i, __m512 x, __m512 y) {
      first = _mm512_fmadd_ps(x, x, first);
      second = _mm512_fmadd_ps(y, y, second);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + i / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + GAP + i / 2), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(y)));
    };
    int64_t i = 0;
    for (; i + 16 <= inside; i += 16) both(i, _mm512_loadu_ps(upper + i), _mm512_loadu_ps(lower + i));
    for (; i < count; i += 16) {
      const __mmask16 some = mask(inside - i);
      both(i, _mm512_maskz_loadu_ps(some, upper + i), _mm512_maskz_loadu_ps(some, lower + i));
    }
    squares[0] = first, squares[1] = second;
  }

  static __m256bh every(uint32_t pair) { return reinterpret_cast<__m256bh>(_mm256_set1_epi32(static_cast<int>(pair))); }

  template <class Beside>
  INLINE Beside add(const float* w, int64_t gap, int64_t first, int64_t rows, int64_t c, Beside beside) {
    alignas(64) static const float zeros[PART] = {};
    __m256 sum[ROWS];
    __m512 square[ROWS / 2][2];
    for (int r = 0; r < ROWS; ++r) sum[r] = _mm256_setzero_ps(), square[r / 2][r % 2] = _mm512_setzero_ps();
    for (int64_t start = 0; start < ld; start += PART) {
      const int64_t count = std::min(PART, ld - start), inside = std::min(PART, c - start);
      uint32_t* part = block + start / PART * ROWS * GAP;
      for (int64_t r = 0; r < ROWS; r += 2)
        round(r < rows ? w + r * gap + start : zeros, r + 1 < rows ? w + (r + 1) * gap + start : zeros, inside, count,
              part + r * GAP, square[r / 2]);
      beside = images(ut + K * start / 2, part, count, sum, beside);
    }
    uint32_t* v = vp + first / 2 * K;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r += 2) {
      const __m128i upper = reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(sum[r]));
      const __m128i lower = reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(sum[r + 1]));
      _mm_store_si128(reinterpret_cast<__m128i*>(v + r / 2 * K), _mm_unpacklo_epi16(upper, lower));
      _mm_store_si128(reinterpret_cast<__m128i*>(v + r / 2 * K + 4), _mm_unpackhi_epi16(upper, lower));
    }
    totals(reinterpret_cast<wide(&)[ROWS]>(square), squares + first);
    for (int64_t start = 0; start < ld; start += PART)
      beside = back(v, block + start / PART * ROWS * GAP, std::min(PART, ld - start), z + start, beside);
    return beside;
  }

  template <class Beside>
  static INLINE Beside images(const uint32_t* u, const uint32_t* part, int64_t count, __m256 (&sums)[ROWS],
                              Beside beside) {
    __m256 sum[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sum[r] = sums[r];
    for (const uint32_t* stop = u + K * count / 2; u < stop; u += K, ++part) {
      beside.work();
      const __m256bh x = reinterpret_cast<__m256bh>(_mm256_load_si256(reinterpret_cast<const __m256i*>(u)));
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sum[r] = _mm256_dpbf16_ps(sum[r], x, every(part[r * GAP]));
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r] = sum[r];
    return beside;
  }

  template <class Beside>
  INLINE Beside back(const uint32_t* v, const uint32_t* part, int64_t count, float* z, Beside beside) const {
    const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (const float* stop = z + count; z < stop; z += 16, part += 8) {
      __m512 sums[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sums[k] = _mm512_load_ps(z + k * ld);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r += 2) {
        beside.work();
        const __m256i upper = _mm256_load_si256(reinterpret_cast<const __m256i*>(part + r * GAP));
        const __m256i lower = _mm256_load_si256(reinterpret_cast<const __m256i*>(part + (r + 1) * GAP));
        const __m512bh x = reinterpret_cast<__m512bh>(
            _mm512_permutex2var_epi16(_mm512_castsi256_si512(upper), order, _mm512_castsi256_si512(lower)));
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k)
          sums[k] = _mm512_dpbf16_ps(
              sums[k], x, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(v[r / 2 * K + k]))));
      }
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) _mm512_store_ps(z + k * ld, sums[k]);
    }
    return beside;
  }

  void gram(int64_t rows, float (&found)[K][K]) const {
    __m256 sum[2][K];  // of pairs of rows in turn: twice as many sums hide the latency
#pragma GCC unroll 16
    for (int i = 0; i < 2 * K; ++i) sum[i / K][i % K] = _mm256_setzero_ps();
    for (int64_t r = 0; r < whole(rows, ROWS) / 2; r += 2)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const uint32_t* v = vp + (r + i) * K;
        const __m256bh x = reinterpret_cast<__m256bh>(_mm256_load_si256(reinterpret_cast<const __m256i*>(v)));
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) sum[i][a] = _mm256_dpbf16_ps(sum[i][a], x, every(v[a]));
      }
    for (int a = 0; a < K; ++a) _mm256_storeu_ps(found[a], _mm256_add_ps(sum[0][a], sum[1][a]));
  }
};

#else

struct Products {
  float *z, *squares, *ut, *v;  // ut [c][K], v [rows][K]
  int64_t ld;

  static int64_t size(int64_t rows, int64_t c) { return 2 * K * whole(c, 16) + (K + 1) * whole(rows, 16); }
  static int64_t scratch(int64_t) { return 0; }

  void start(float* space, float*, const float* u, int64_t rows, int64_t c) {
    ld = whole(c, 16);
    z = space;
    ut = z + K * ld;
    v = ut + K * ld;
    squares = v + K * whole(rows, 16);
    std::memset(z, 0, sizeof(float) * K * ld);
    std::fill(squares + rows, squares + whole(rows, 16), 0.0f);
    for (int64_t i = 0; i < c; ++i)
      for (int k = 0; k < K; ++k) ut[K * i + k] = u[k * c + i];
  }

  template <int N, class Beside>
  INLINE Beside images(const float* w, int64_t gap, int64_t c, float* v, Beside beside) const {
    f8 sum[N];
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) sum[r] = f8{};
    int64_t i = 0;
    for (; i + 4 <= c; i += 4) {
      if (N == R) beside.work();
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const f8 u = read8(ut + K * (i + j));
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) sum[r] += w[r * gap + i + j] * u;
      }
    }
    for (; i < c; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) sum[r] += w[r * gap + i] * read8(ut + K * i);
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) write8(v + K * r, sum[r]);
    return beside;
  }

  template <class Beside>
  INLINE Beside add(const float* w, int64_t gap, int64_t first, int64_t rows, int64_t c, Beside beside) {
    float *image = v + K * first, *square = squares + first;
    int64_t r = 0;
    for (; r + R <= rows; r += R) beside = images<R>(w + r * gap, gap, c, image + K * r, beside);
    for (; r < rows; ++r) beside = images<1>(w + r * gap, gap, c, image + K * r, beside);
    wide parts[ROWS];
    for (r = 0; r < rows; ++r) parts[r] = wide{};
    int64_t i = 0;
    for (; i + W <= c; i += W) {
      wide sum[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum[k] = read(z + k * ld + i);
      for (r = 0; r < rows; ++r) {
        if (r % 2 == 0) beside.work();
        const wide x = read(w + r * gap + i);
        parts[r] += x * x;
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sum[k] += x * image[K * r + k];
      }
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) write(z + k * ld + i, sum[k]);
    }
    for (r = 0; r < rows; ++r) square[r] = total(parts[r]);
    for (; i < c; ++i) {
      f8 sum = f8{};
      for (r = 0; r < rows; ++r) {
        const float x = w[r * gap + i];
        square[r] += x * x;
        sum += x * read8(image + K * r);
      }
      for (int k = 0; k < K; ++k) z[k * ld + i] += sum[k];
    }
    return beside;
  }

  void gram(int64_t rows, float (&found)[K][K]) const {
    f8 sum[K];
    for (int a = 0; a < K; ++a) sum[a] = f8{};
    for (int64_t r = 0; r < rows; ++r) {
      const f8 row = read8(v + K * r);
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) sum[a] += v[K * r + a] * row;
    }
    for (int a = 0; a < K; ++a) write8(found[a], sum[a]);
  }
};

#endif

}  // namespace
