// Runs the tests where there is a device; else says how many are left out, and exits with 77.
#if __has_include(<catch2/catch_test_macros.hpp>)
#include <catch2/catch_all.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif
#include <cuda_runtime_api.h>

#include <iostream>

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::cout << "skipped: no CUDA device for "
              << Catch::getRegistryHub().getTestCaseRegistry().getAllTests().size() << " test cases"
              << std::endl;
    return 77;
  }
  return Catch::Session().run(argc, argv);
}
