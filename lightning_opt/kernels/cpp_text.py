"""The C++ around a rule's own statements; `cpp` fills in what stands between two `@`."""

# The list is one long row cut into blocks that threads take as they come free: small tensors cost no call of their own,
# and a thread that was held up does not hold up the others.
SOURCE = """
#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {
  uint16_t bits;
  operator float() const { uint32_t wide = uint32_t(bits) << 16; float x; memcpy(&x, &wide, 4); return x; }
  bfloat16& operator=(float x) {
    uint32_t wide; memcpy(&wide, &x, 4);
    bits = x != x ? 0x7FC0 : uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);  // to nearest, ties to even
    return *this;
  }
  void by_chance(float x, uint32_t random) {
    uint32_t wide; memcpy(&wide, &x, 4);
    const bool finite = (wide & 0x7F800000) != 0x7F800000;
    bits = finite ? uint16_t((wide + (random & 0xFFFF)) >> 16) : x != x ? 0x7FC0 : uint16_t(wide >> 16);
  }
};

inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
inline float uniform(uint32_t at) { return float(int32_t(mixed(at) >> 8)) * 0x1p-24f; }

// As in quantised.py, operation by operation; without branches, which would keep the loop out of vector registers.
inline int32_t magnitude(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits & 0x7FFFFFFF; }  // NaN: the most
inline float fourth(float c) { return (c * std::abs(c)) * (c * c); }
inline float code(float x, float inverse, float chance, float levels) {
  const float size = std::abs(x) * inverse;
  const float low = float(int32_t(std::sqrt(std::sqrt(size)))), high = low + 1;
  const float below = (low * low) * (low * low), above = (high * high) * (high * high);
  const float found = low + float(size - below > chance * (above - below));
  return found < levels ? found : levels;
}

using T = @T@;
template <class V> inline V sign(V a) { return V((a > 0) - (a < 0)); }
template <class V> inline V lerp(V a, V b, V w) {
  return std::abs(w) < V(0.5) ? a + w * (b - a) : b - (b - a) * (1 - w);
}
template <class V> inline V larger(V a, V b) { return a > b || a != a ? a : b; }
template <class V> inline V smaller(V a, V b) { return a < b || a != a ? a : b; }
template <class V> inline V clamp(V a, V low, V high) { a = a < low ? low : a; return a > high ? high : a; }

// What `apply` does to a stretch of one tensor, and what it first sums up over it.
@FUNCTIONS@

template <class F> static void walk(int64_t count, const int64_t* starts, int threads, F visit) {
  const int64_t block = 1 << 16, total = starts[count], blocks = (total + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(blocks < 1 ? 1 : blocks < threads ? int(blocks) : threads)
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t from = b * block, tensor = 0, beyond = count;
    const int64_t to = total < from + block ? total : from + block;
    while (beyond - tensor > 1) {
      const int64_t middle = (tensor + beyond) / 2;
      (starts[middle] <= from ? tensor : beyond) = middle;
    }
    for (; from < to; ++tensor) {
      const int64_t end = to < starts[tensor + 1] ? to : starts[tensor + 1];
      visit(b, tensor, from - starts[tensor], end - from);
      from = end;
    }
  }
}

extern "C" void update(int64_t count, const int64_t* starts, void* const* at, const double* numbers,
                       const double* const* factors, int threads) {
  walk(count, starts, threads, [=](int64_t, int64_t tensor, int64_t i, int64_t n) {
@CLIP@
    run(@POINTERS@, numbers, factors, tensor, i, n);
  });
}
@SUMS@
"""

# Stretches of one block and tensor each have a place of their own in `partial`, so the sum does not depend on which
# thread was where.
SUM = """
extern "C" void sum@K@(int64_t count, const int64_t* starts, void* const* at, const double* numbers,
                     const double* const* factors, int threads, double* partial, double* totals) {
  walk(count, starts, threads, [=](int64_t b, int64_t tensor, int64_t i, int64_t n) {
@CLIP@
    partial[b + tensor] = add@K@(@POINTERS@, numbers, factors, tensor, n);
  });
  const int64_t block = 1 << 16;
  for (int64_t tensor = 0; tensor < count; ++tensor) {
    totals[tensor] = 0;
    for (int64_t b = starts[tensor] / block; b * block < starts[tensor + 1]; ++b)
      if (starts[tensor] < starts[tensor + 1]) totals[tensor] += partial[b + tensor];
  }
}
"""

RUN = """
static void run(@STREAMS@, const double* numbers, const double* const* factors, int64_t tensor, int64_t first,
                int64_t n) {
@NUMBERS@
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
@BODY@
  }
}
"""

# With states in codes: a block of them at a time, whose values never leave the cache.
RUN_CODED = """
static void run(@STREAMS@, const double* numbers, const double* const* factors, int64_t tensor, int64_t first,
                int64_t n) {
@NUMBERS@
  float @VALUES@;
  for (int64_t from = 0; from < n; from += @BLOCK@) {
    const int64_t to = n < from + @BLOCK@ ? n : from + @BLOCK@;
@SCALES@
#pragma omp simd@REDUCTIONS@
    for (int64_t i = from; i < to; ++i) {
@BODY@
    }
@ENCODE@
  }
}
"""

ENCODE = """
    float most@k@; memcpy(&most@k@, &top@k@, 4);
    most@k@ = top@k@ >= 0x7F800000 ? NAN : most@k@ < @TINY@f ? 0.0f : most@k@;
    const float inverse@k@ = most@k@ > 0 ? @LEVELS4@f / most@k@ : 0.0f;
    c@k@[from / @BLOCK@] = most@k@;
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      const float x = d@k@[i - from], found = code(x, inverse@k@, @CHANCE@, @LEVELS@);
      s@k@[i] = @SIGNED@;
    }
"""

ADD = """
static double add@K@(@STREAMS@, const double* numbers, const double* const* factors, int64_t tensor, int64_t n) {
@NUMBERS@
  double total = 0;
  for (int64_t from = 0; from < n; from += @PART@) {  // short sums in T, which a double then adds up
    const int64_t to = n < from + @PART@ ? n : from + @PART@;
@SCALES@
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = from; i < to; ++i) {
@BODY@
    }
    total += sum;
  }
  return total;
}
"""
