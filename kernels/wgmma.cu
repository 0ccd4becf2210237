// Products of a warpgroup on Hopper: d[64 x N] (+)= a b for N of 8, 16, 32, 64 and 128,
// both bf16 in shared memory. b [N x 16] is K-major; so is a [64 x 16], or, where Turned,
// its transpose [16 x 64] is there. A thread has N / 2 sums. The text of the kernels that
// multiply so follows this one.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900

#define ACC4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define ACC16(i) ACC4(i), ACC4((i) + 4), ACC4((i) + 8), ACC4((i) + 12)
#define LIST_4 "%0, %1, %2, %3"
#define LIST_8 LIST_4 ", %4, %5, %6, %7"
#define LIST_16 LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LIST_32 \
  LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64                                                                                      \
  LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49" \
          ", %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(n, list, a, b, p, turned) \
  "{\n .reg .pred p;\n setp.ne.b32 p, %" p ", 0;\n wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" list "}, %" a ", %" b ", p, 1, 1, %" turned ", 0;\n}"
#define WGMMA_INPUTS "l"(a), "l"(b), "r"(accumulate), "n"(Turned)

template <bool Turned = false>
DEVICE void wgmma(float (&d)[4], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("8", LIST_4, "4", "5", "6", "7") : ACC4(0) : WGMMA_INPUTS);
}
template <bool Turned = false>
DEVICE void wgmma(float (&d)[8], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("16", LIST_8, "8", "9", "10", "11") : ACC4(0), ACC4(4) : WGMMA_INPUTS);
}
template <bool Turned = false>
DEVICE void wgmma(float (&d)[16], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("32", LIST_16, "16", "17", "18", "19") : ACC16(0) : WGMMA_INPUTS);
}
template <bool Turned = false>
DEVICE void wgmma(float (&d)[32], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("64", LIST_32, "32", "33", "34", "35") : ACC16(0), ACC16(16) : WGMMA_INPUTS);
}
template <bool Turned = false>
DEVICE void wgmma(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile(WGMMA("128", LIST_64, "64", "65", "66", "67")
               : ACC16(0), ACC16(16), ACC16(32), ACC16(48)
               : WGMMA_INPUTS);
}
// Keeps the compiler from moving uses of accumulators across a wait or a fence.
template <int Sums>
DEVICE void settle(float (&d)[Sums]) {
#pragma unroll
  for (int i = 0; i < Sums; i += 4) asm volatile("" : ACC4(i)::"memory");
}
#endif
