# What graft needs from outside; docs/dependencies.md gives the reasons. Nothing is downloaded here.
find_package(LibTorch 2.11 REQUIRED)
message(STATUS "graft: LibTorch ${LibTorch_VERSION} in ${LibTorch_ROOT_DIR}")
find_package(Threads REQUIRED)
# OpenMP by its flags, not by the path of the compiler's libgomp: a LibTorch wheel brings a libgomp of its own, and the
# two must be one at run time.
find_package(OpenMP REQUIRED COMPONENTS CXX)
separate_arguments(GRAFT_OPENMP_FLAGS NATIVE_COMMAND "${OpenMP_CXX_FLAGS}")

# Header-only helpers that stay out of the public headers.
add_library(graft_private_deps INTERFACE)
find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp REQUIRED DOC "nlohmann-json (Debian: nlohmann-json3-dev)")
# fmt: torch's headers carry a copy and are on every include path, so that copy is the one we use, header-only. One
# program must never see two versions. Only a LibTorch without it falls back to the system's.
if(LibTorch_FMT_INCLUDE_DIR)
  set(GRAFT_FMT_INCLUDE_DIR "${LibTorch_FMT_INCLUDE_DIR}")
else()
  find_path(GRAFT_FMT_INCLUDE_DIR fmt/format.h REQUIRED DOC "fmt (Debian: libfmt-dev)")
endif()
target_include_directories(graft_private_deps SYSTEM INTERFACE "${NLOHMANN_JSON_INCLUDE_DIR}" "${GRAFT_FMT_INCLUDE_DIR}")
target_compile_definitions(graft_private_deps INTERFACE FMT_HEADER_ONLY)

if(GRAFT_EXAMPLES)
  find_path(CLI11_INCLUDE_DIR CLI/CLI.hpp REQUIRED DOC "CLI11 (Debian: libcli11-dev)")
  find_path(PCRE2_INCLUDE_DIR pcre2.h REQUIRED DOC "PCRE2 (Debian: libpcre2-dev)")
  find_library(PCRE2_LIBRARY pcre2-8 REQUIRED DOC "PCRE2 (Debian: libpcre2-dev)")
  find_path(UTF8PROC_INCLUDE_DIR utf8proc.h REQUIRED DOC "utf8proc (Debian: libutf8proc-dev)")
  find_library(UTF8PROC_LIBRARY utf8proc REQUIRED DOC "utf8proc (Debian: libutf8proc-dev)")
endif()
if(GRAFT_TESTS)
  find_path(CATCH2_INCLUDE_DIR NAMES catch2/catch.hpp catch2/catch_test_macros.hpp REQUIRED
            DOC "Catch2 (Debian: catch2)")
  find_package(Catch2 3 CONFIG QUIET)
endif()

if(GRAFT_CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "graft: CUDA toolkit ${CUDAToolkit_VERSION}; the kernels are built")
endif()
