# Options, output folders, warnings and the compiler cache. No dependency is looked for here.
include(GNUInstallDirs)

option(GRAFT_EXAMPLES "Build the example programs (finetune, generate, evaluate, adapter)" ${PROJECT_IS_TOP_LEVEL})
option(GRAFT_TESTS "Build the tests (needs the examples)" ${PROJECT_IS_TOP_LEVEL})
option(GRAFT_INSTALL "Generate the install target" ${PROJECT_IS_TOP_LEVEL})
option(GRAFT_PCH "Use one precompiled header for graft's own files" ON)
option(GRAFT_WERROR "Treat warnings as errors in graft's own files" OFF)
option(GRAFT_CUDA "Build the CUDA kernels and let the library call them, which needs the toolkit (docs/kernels.md)" OFF)
set(GRAFT_SANITIZE "" CACHE STRING "Sanitizers for graft's own files, e.g. address,undefined")

if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
  endif()
  find_program(CCACHE_PROGRAM ccache)
  if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    # The sloppiness is what ccache asks for when precompiled headers are in use.
    set(CMAKE_CXX_COMPILER_LAUNCHER
        ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
        ${CCACHE_PROGRAM})
    add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fpch-preprocess>)
  endif()
endif()

function(graft_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-unknown-pragmas $<$<BOOL:${GRAFT_WERROR}>:-Werror>)
  if(GRAFT_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${GRAFT_SANITIZE} -fno-omit-frame-pointer)
    target_link_options(${target} PUBLIC -fsanitize=${GRAFT_SANITIZE})
  endif()
endfunction()
