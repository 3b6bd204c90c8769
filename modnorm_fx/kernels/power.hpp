// Block power iteration: the largest singular values of many small or large matrices, from one reading of each.
//
// `spectral_norm.power_iteration` has the algorithm and its derivation. Float32, rows contiguous. A matrix is always
// worked on by one thread, in the same order, so results do not depend on the number of threads. What is made of its
// products, eight by eight, is a chain of operations that wait for each other. It is done for W matrices at once, one
// in each lane of a register, each as if it were alone: results do not depend on who its neighbours are either.

#pragma once

#include "products.hpp"

namespace {

constexpr int SQUARINGS = 8;     // spectral_norm.SQUARINGS
constexpr float JITTER = 1e-6f;  // spectral_norm.JITTER
constexpr double TINY = 1e-15;   // spectral_norm.TINY

INLINE wide roots(wide x) {
  float each[W];
  std::memcpy(each, &x, sizeof each);
  for (int i = 0; i < W; ++i) each[i] = std::sqrt(each[i]);
  return read(each);
}

// Symmetric, non-negative matrices of the products of K vectors; what is above the diagonal is not used.
struct Grams {
  wide x[K][K];

  wide trace() const {
    wide sum = x[0][0];
    for (int a = 1; a < K; ++a) sum += x[a][a];
    return sum;
  }

  // The products of the rows a in [first, stop) of z [K][ld] with all rows b <= a.
  template <int first, int stop>
  INLINE void dots(int lane, const float* z, int64_t ld) {
    constexpr int count = (stop * (stop + 1) - first * (first + 1)) / 2;
    wide sum[count];
#pragma GCC unroll 24
    for (int i = 0; i < count; ++i) sum[i] = wide{};
    for (int64_t i = 0; i < ld; i += W) {
      wide row[stop];
#pragma GCC unroll 8
      for (int a = 0; a < stop; ++a) row[a] = read(z + a * ld + i);
      int at = 0;
#pragma GCC unroll 8
      for (int a = first; a < stop; ++a)
#pragma GCC unroll 8
        for (int b = 0; b <= a; ++b) sum[at++] += row[a] * row[b];
    }
    alignas(64) float found[16];
    totals(sum, found);
    int at = 0;
#pragma GCC unroll 8
    for (int a = first; a < stop; ++a)
#pragma GCC unroll 8
      for (int b = 0; b <= a; ++b) x[a][b][lane] = found[at++];
  }

  void of_rows(int lane, const float* z, int64_t ld) {
    dots<0, 4>(lane, z, ld);  // as many sums as there are registers
    dots<4, 6>(lane, z, ld);
    dots<6, 8>(lane, z, ld);
  }

  void put(int lane, const float (&given)[K][K]) {
    for (int a = 0; a < K; ++a)
      for (int b = 0; b <= a; ++b) x[a][b][lane] = given[a][b];
  }
};

// The largest eigenvalues of matrices of trace 1: squared SQUARINGS times, which leaves one eigenvector or several
// whose eigenvalues hardly differ, then the Rayleigh quotient (spectral_norm.largest_eigenvalue).
wide largest_eigenvalues(const Grams& given) {
  Grams powers[2];
  for (int a = 0; a < K; ++a)
    for (int b = 0; b <= a; ++b) powers[0].x[a][b] = powers[0].x[b][a] = given.x[a][b];
  for (int round = 0; round < SQUARINGS; ++round) {
    const Grams& m = powers[round % 2];
    Grams& next = powers[1 - round % 2];
    const wide trace = m.trace(), scale = 1.0f / (trace * trace);
#pragma GCC unroll 8
    for (int a = 0; a < K; ++a) {
      wide row[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) row[k] = m.x[a][k];
#pragma GCC unroll 8
      for (int b = 0; b <= a; ++b) {
        wide sum = row[0] * m.x[b][0];
#pragma GCC unroll 8
        for (int k = 1; k < K; ++k) sum += row[k] * m.x[b][k];
        next.x[a][b] = next.x[b][a] = sum * scale;
      }
    }
  }
  const Grams& m = powers[SQUARINGS % 2];
  wide column[K], best = m.x[0][0], above = wide{}, below = wide{};
  for (int k = 0; k < K; ++k) column[k] = m.x[0][k];
  for (int a = 1; a < K; ++a) {
    const auto better = m.x[a][a] > best;
    best = better ? m.x[a][a] : best;
    for (int k = 0; k < K; ++k) column[k] = better ? m.x[a][k] : column[k];
  }
  for (int a = 0; a < K; ++a) {
    wide image = wide{};
    for (int k = 0; k < K; ++k) image += given.x[std::max(a, k)][std::min(a, k)] * column[k];
    above += image * column[a];
    below += column[a] * column[a];
  }
  return above / below;
}

// The Cholesky factors L of matrices over their traces t: spectral_norm.whitened.
struct Whitening {
  wide below[K][K], inverse[K];  // √t L below the diagonal; 1 / √t over the diagonal

  explicit Whitening(const Grams& gram) {
    const wide trace = gram.trace(), factor = 1.0f / trace, least = wide{} + JITTER * JITTER;
    const wide root = roots(trace), size = 1.0f / root;
    for (int a = 0; a < K; ++a)
      for (int b = 0; b <= a; ++b) below[a][b] = factor * gram.x[a][b];
    for (int b = 0; b < K; ++b) {
      const wide pivot = below[b][b] + JITTER;
      inverse[b] = 1.0f / roots(pivot > least ? pivot : least);
      for (int a = b + 1; a < K; ++a) below[a][b] *= inverse[b];
      for (int a = b + 1; a < K; ++a)
        for (int k = b + 1; k <= a; ++k) below[a][k] -= below[a][b] * below[k][b];
    }
    for (int b = 0; b < K; ++b) {
      inverse[b] *= size;
      for (int a = b + 1; a < K; ++a) below[a][b] *= root;
    }
  }

  // L⁻¹ row / √t for W columns of the vectors of one matrix: forward substitution.
  INLINE void solve(int lane, wide (&row)[K]) const {
#pragma GCC unroll 8
    for (int b = 0; b < K; ++b) {
      row[b] *= inverse[b][lane];
#pragma GCC unroll 8
      for (int a = b + 1; a < K; ++a) row[a] -= below[a][b][lane] * row[b];
    }
  }
};

// One step of block power iteration for a matrix [rows, c]: entry i of row r is w[r·gap + i·step].
struct Iteration {
  Products products;
  const float *w, *u;  // its vectors [K][c], those that follow (may be the same), and the norm
  int64_t gap, step;
  float *fresh, *norm;

  // Of the squares of the rows: their sum and the largest.
  void longest(int64_t rows, float& sum, float& largest) const {
    wide most = wide{}, sums = wide{};
    for (int64_t r = 0; r < rows; r += W) {
      const wide x = read(products.squares + r);
      sums += x;
      most = most > x ? most : x;
    }
    sum = total(sums), largest = 0;
    for (int i = 0; i < W; ++i) largest = std::max(largest, most[i]);
  }

  void write_fresh(const Whitening& lower, int lane, int64_t c, const float* dither, float scale) const {
    for (int64_t i = 0; i < c; i += W) {
      wide row[K];
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) row[a] = read(products.z + a * products.ld + i);
      lower.solve(lane, row);
      if (i + W <= c) {
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) write(fresh + a * c + i, row[a] + scale * read(dither + a * c + i));
      } else {
        for (int a = 0; a < K; ++a)
          for (int64_t j = i; j < c; ++j) fresh[a * c + j] = row[a][j - i] + scale * dither[a * c + j];
      }
    }
  }
};

// From v = W u and z = Wᵀ v of at most W matrices: their largest singular values on the span of v, and the vectors that
// follow. z becomes Wᵀ y for an orthonormal basis y of that span: spectral_norm.ritz has the derivation.
void finish_lanes(Iteration* each, int count, int64_t rows, int64_t c, const float* dither, float scale) {
  Grams gram = {};
  for (int i = 0; i < count; ++i) {
    float found[K][K];
    each[i].products.gram(rows, found);
    gram.put(i, found);
  }
  const auto usable = [](float trace) { return trace > TINY * TINY && std::isfinite(trace); };
  const wide first = gram.trace();
  const Whitening images(gram);
  for (int i = 0; i < count; ++i) {
    if (!usable(first[i])) continue;
    float* z = each[i].products.z;
    const int64_t ld = each[i].products.ld;
    for (int64_t j = 0; j < ld; j += W) {
      wide row[K];
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) row[a] = read(z + a * ld + j);
      images.solve(i, row);
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a) write(z + a * ld + j, row[a]);
    }
    gram.of_rows(i, z, ld);
  }
  const wide second = gram.trace(), factor = 1.0f / second;
  Grams scaled;
  for (int a = 0; a < K; ++a)
    for (int b = 0; b <= a; ++b) scaled.x[a][b] = factor * gram.x[a][b];
  const wide norms = roots(largest_eigenvalues(scaled)) * roots(second);
  bool moves[W];
  for (int i = 0; i < count; ++i) {
    Iteration& x = each[i];
    float found = norms[i], sum, longest;
    const bool finite = std::isfinite(first[i]) && std::isfinite(second[i]);
    if (!usable(first[i]) || !usable(second[i])) found = finite ? 0.0f : NAN;
    x.longest(rows, sum, longest);
    if (!std::isfinite(sum)) found = NAN;
    const float row = std::sqrt(longest);
    if (row > found) {  // the vectors have lost track: the row is one of them
      const int64_t r = std::find(x.products.squares, x.products.squares + rows, longest) - x.products.squares;
      for (int64_t j = 0; j < c; ++j) x.products.z[j] = x.w[r * x.gap + j * x.step];
      gram.of_rows(i, x.products.z, x.products.ld);
      found = row;
    }
    *x.norm = found;
    moves[i] = found > TINY;
  }
  const Whitening vectors(gram);
  for (int i = 0; i < count; ++i)
    if (moves[i])
      each[i].write_fresh(vectors, i, c, dither, scale);
    else if (each[i].fresh != each[i].u)
      std::memcpy(each[i].fresh, each[i].u, sizeof(float) * K * c);
}

// Steps of matrices of one shape, in memory that a thread keeps: fresh memory would have to be mapped in every step.
class Iterations {
  Floats space;
  std::vector<Iteration> each;

 public:
  void fit(int64_t count, int64_t rows, int64_t c) {
    each.resize(count);
    space.fit(count * Products::size(rows, c) + Products::scratch(c));
  }

  void start(int64_t i, const float* u, float* fresh, float* norm, int64_t rows, int64_t c) {
    float *scratch = space.data(), *own = scratch + Products::scratch(c) + i * Products::size(rows, c);
    each[i].products.start(own, scratch, u, rows, c);
    each[i].u = u, each[i].fresh = fresh, each[i].norm = norm;
  }

  Iteration& operator[](int64_t i) { return each[i]; }

  void finish(int64_t count, int64_t rows, int64_t c, const float* dither, float scale) {
    for (int64_t i = 0; i < count; i += W)
      finish_lanes(each.data() + i, static_cast<int>(std::min<int64_t>(W, count - i)), rows, c, dither, scale);
  }
};

// How many of n things with this many entries are worked on together: those of which LIMIT are at hand.
int64_t together(int64_t n, int64_t entries, int threads) {
  constexpr int64_t LIMIT = 65536;
  return std::max<int64_t>(1, std::min({static_cast<int64_t>(W), LIMIT / entries, (n + threads - 1) / threads}));
}

}  // namespace
