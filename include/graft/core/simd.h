/// GRAFT_SIMD: one function, compiled for several vector widths, chosen when the program starts.
#pragma once

/// Put before a plain (not template) static function whose loops should use AVX-512 or AVX2 where
/// the processor has them, without any -march flag:
///
///   GRAFT_SIMD static void scale(float* x, int64_t n);
///
/// Lambdas inside such a function are not covered: let the lambda call the function instead.
/// Empty on compilers and architectures without function clones, and under sanitizers, whose
/// start-up code does not survive the resolvers.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define GRAFT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GRAFT_SIMD
#endif
