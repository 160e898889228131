# FindLibTorch: LibTorch from a Python wheel, an unpacked libtorch archive or a distribution package.
#
# Why not find_package(Torch): the wheel's own config demands the CUDA toolkit, enables CUDA as a language and links
# programs against every NVIDIA library. Here the CPU and CUDA parts are separate imported targets.
#
# Where it looks, first hit wins:
#   LIBTORCH_ROOT (CMake or environment variable): the folder that holds include/ and lib/; the environment's value is
#   remembered, since a build configures itself again when files are added
#   the active or the named Python (LIBTORCH_PYTHON): the folder of its `torch` package, found without importing it
#   /usr, /usr/local, /opt/libtorch
#
# Result: LibTorch_FOUND, LibTorch_VERSION, LibTorch_ROOT_DIR, targets LibTorch::cpu and, where the files exist,
# LibTorch::cuda and LibTorch::cuda_streams; variable LibTorch_FMT_INCLUDE_DIR when the headers carry a copy of fmt.

if(DEFINED ENV{LIBTORCH_ROOT})
  set(LibTorch_ENVIRONMENT_ROOT "$ENV{LIBTORCH_ROOT}" CACHE INTERNAL "LIBTORCH_ROOT of the environment")
endif()
set(_lt_candidates "")
foreach(_lt_root IN ITEMS "${LIBTORCH_ROOT}" "${LibTorch_ENVIRONMENT_ROOT}")
  if(_lt_root)
    list(APPEND _lt_candidates "${_lt_root}" "${_lt_root}/torch")
  endif()
endforeach()
if(NOT _lt_candidates)
  find_program(LIBTORCH_PYTHON NAMES python3 python DOC "Python whose torch package provides LibTorch")
  if(LIBTORCH_PYTHON)
    execute_process(
      COMMAND ${LIBTORCH_PYTHON} -c
              "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE _lt_python_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_lt_python_root)
      list(APPEND _lt_candidates "${_lt_python_root}")
    endif()
  endif()
  list(APPEND _lt_candidates /usr/local /usr /opt/libtorch)
endif()

set(LibTorch_ROOT_DIR "")
foreach(_lt_root IN LISTS _lt_candidates)
  if(EXISTS "${_lt_root}/include/ATen/ATen.h" AND EXISTS "${_lt_root}/include/c10/core/DispatchKey.h")
    set(LibTorch_ROOT_DIR "${_lt_root}")
    break()
  endif()
endforeach()

set(LibTorch_VERSION "")
if(LibTorch_ROOT_DIR)
  set(LibTorch_INCLUDE_DIR "${LibTorch_ROOT_DIR}/include")
  foreach(_lt_header IN ITEMS torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
    if(NOT LibTorch_VERSION AND EXISTS "${LibTorch_INCLUDE_DIR}/${_lt_header}")
      file(STRINGS "${LibTorch_INCLUDE_DIR}/${_lt_header}" _lt_lines
           REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) +[0-9]+")
      if(_lt_lines)
        string(REGEX REPLACE "[^0-9;]" "" _lt_numbers "${_lt_lines}")
        string(REPLACE ";" "." LibTorch_VERSION "${_lt_numbers}")
      endif()
    endif()
  endforeach()
  # Not cached: the libraries must always be those beside the headers, also after LIBTORCH_ROOT has changed.
  find_library(LibTorch_CPU_LIBRARY torch_cpu PATHS "${LibTorch_ROOT_DIR}/lib" "${LibTorch_ROOT_DIR}/lib/x86_64-linux-gnu"
               NO_DEFAULT_PATH NO_CACHE)
  find_library(LibTorch_C10_LIBRARY c10 PATHS "${LibTorch_ROOT_DIR}/lib" "${LibTorch_ROOT_DIR}/lib/x86_64-linux-gnu"
               NO_DEFAULT_PATH NO_CACHE)
  find_library(LibTorch_CUDA_LIBRARY torch_cuda PATHS "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH NO_CACHE)
  find_library(LibTorch_C10_CUDA_LIBRARY c10_cuda PATHS "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH NO_CACHE)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_ROOT_DIR LibTorch_CPU_LIBRARY LibTorch_C10_LIBRARY
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE
    "set LIBTORCH_ROOT to an unpacked libtorch, or LIBTORCH_PYTHON to a Python that has torch (pip install --no-deps torch==2.15.0 nvidia-cuda-runtime nvidia-cuda-cupti is enough)")

if(LibTorch_FOUND AND NOT TARGET LibTorch::cpu)
  add_library(LibTorch::c10 SHARED IMPORTED)
  set_target_properties(LibTorch::c10 PROPERTIES IMPORTED_LOCATION "${LibTorch_C10_LIBRARY}")
  add_library(LibTorch::cpu SHARED IMPORTED)
  set_target_properties(LibTorch::cpu PROPERTIES IMPORTED_LOCATION "${LibTorch_CPU_LIBRARY}")
  # A system include path: a distribution package in /usr/include must not be named again.
  if(NOT LibTorch_INCLUDE_DIR STREQUAL "/usr/include")
    target_include_directories(LibTorch::cpu SYSTEM INTERFACE "${LibTorch_INCLUDE_DIR}")
  endif()
  target_include_directories(LibTorch::cpu SYSTEM INTERFACE "${LibTorch_INCLUDE_DIR}/torch/csrc/api/include")
  target_compile_features(LibTorch::cpu INTERFACE cxx_std_20)
  target_link_libraries(LibTorch::cpu INTERFACE LibTorch::c10)
  # A CUDA wheel's libtorch_cpu needs libcudart and libcupti; at run time its own RPATH finds them beside the wheel.
  set(_lt_nvidia "${LibTorch_ROOT_DIR}/../nvidia/cu13/lib")
  if(EXISTS "${_lt_nvidia}")
    target_link_options(LibTorch::cpu INTERFACE "LINKER:-rpath-link,${_lt_nvidia}")
  endif()
  if(EXISTS "${LibTorch_INCLUDE_DIR}/fmt/format-inl.h")
    set(LibTorch_FMT_INCLUDE_DIR "${LibTorch_INCLUDE_DIR}")
  endif()
  if(LibTorch_CUDA_LIBRARY AND LibTorch_C10_CUDA_LIBRARY)
    add_library(LibTorch::cuda INTERFACE IMPORTED)
    # torch_cuda registers its operators in static initialisers: the linker must keep it although no symbol is used.
    target_link_options(LibTorch::cuda INTERFACE "LINKER:--no-as-needed,${LibTorch_CUDA_LIBRARY},--as-needed")
    target_link_libraries(LibTorch::cuda INTERFACE LibTorch::cpu "${LibTorch_C10_CUDA_LIBRARY}")
    # What a program needs that launches kernels of its own, and that starts on machines without a GPU too: streams and
    # the run-time library that LibTorch itself loads. libtorch_cuda, with its gigabytes, can be loaded when it is wanted.
    find_library(LibTorch_CUDART_LIBRARY NAMES cudart libcudart.so.13 libcudart.so.12
                 PATHS "${_lt_nvidia}" "${LibTorch_ROOT_DIR}/lib" NO_DEFAULT_PATH NO_CACHE)
    if(NOT LibTorch_CUDART_LIBRARY)
      find_library(LibTorch_CUDART_LIBRARY NAMES cudart PATHS ENV CUDA_PATH ENV CUDA_HOME /usr/local/cuda
                   PATH_SUFFIXES lib64 lib NO_CACHE)
    endif()
    if(LibTorch_CUDART_LIBRARY)
      add_library(LibTorch::cuda_streams INTERFACE IMPORTED)
      target_link_libraries(LibTorch::cuda_streams INTERFACE LibTorch::cpu "${LibTorch_C10_CUDA_LIBRARY}"
                                                             "${LibTorch_CUDART_LIBRARY}")
    endif()
  endif()
endif()
