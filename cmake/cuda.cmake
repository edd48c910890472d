# The CUDA language, cuBLASLt and the flags of every .cu file. The toolkit is the system's or the one
# scripts/cuda_toolkit made; CUDACXX or CMAKE_CUDA_COMPILER name another.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  execute_process(COMMAND ${PROJECT_SOURCE_DIR}/scripts/cuda_toolkit --find
    OUTPUT_VARIABLE toolkit OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "LORIKEET_CUDA needs a CUDA toolkit; scripts/cuda_toolkit makes one")
  endif()
  set(CMAKE_CUDA_COMPILER ${toolkit}/bin/nvcc CACHE FILEPATH "nvcc")
endif()
if(NOT CMAKE_CUDA_HOST_COMPILER)
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()

# A100 and Hopper as machine code, no PTX: what other cards there are is said at start. 90a runs on
# every Hopper and is the only target with its tensor cores' own instructions.
set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real" CACHE STRING "GPUs to build for")
enable_language(CUDA)
if(CMAKE_VERSION VERSION_LESS 3.26)  # knows no C++20 in CUDA
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
# nvcc hands what it does not know, -Wall say, to the host's compiler.
add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo>")
set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})

# With a minimum above 3.24, CMake 3.25 looks here for an nvToolsExt that CUDA 13 no longer has.
find_package(CUDAToolkit REQUIRED)

# CMake takes the toolkit's folder for one that the loader searches anyway.
list(APPEND CMAKE_BUILD_RPATH ${CUDAToolkit_LIBRARY_DIR})
