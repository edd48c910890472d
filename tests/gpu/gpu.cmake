# lorikeet_gpu_test(name sources... LIBS libs...): as lorikeet_test, skipped where there is no device.
# A build without CUDA only lists it.
function(lorikeet_gpu_test name)
  if(NOT LORIKEET_CUDA)
    add_test(NAME ${name} COMMAND ${CMAKE_COMMAND} -E false)
    set_tests_properties(${name} PROPERTIES LABELS gpu DISABLED TRUE)
    return()
  endif()
  lorikeet_test(${name} ${PROJECT_SOURCE_DIR}/tests/gpu/needs_gpu.cc ${ARGN} LABELS gpu)
  target_link_libraries(${name} PRIVATE lorikeet_kernels_cuda CUDA::cudart_static)
  set_tests_properties(${name} PROPERTIES SKIP_REGULAR_EXPRESSION "no CUDA device" RUN_SERIAL TRUE)
endfunction()

set(gpu ${PROJECT_SOURCE_DIR}/tests/gpu)
lorikeet_gpu_test(cuda_kernels_test ${gpu}/cuda_kernels_test.cc ${gpu}/cuda_attention_test.cc
  ${gpu}/cuda_experts_test.cc
  LIBS lorikeet_kernels_cuda)
lorikeet_gpu_test(cuda_sampler_test ${gpu}/cuda_sampler_test.cc LIBS lorikeet_kernels_cuda)
lorikeet_gpu_test(cuda_model_golden_test ${PROJECT_SOURCE_DIR}/tests/golden/model_golden_test.cc
  ${PROJECT_SOURCE_DIR}/tests/support/model_harness.cc ${gpu}/cuda_test_backend.cc
  LIBS lorikeet_runner lorikeet_adapters_cache)
lorikeet_gpu_test(cuda_batch_invariance_test ${PROJECT_SOURCE_DIR}/tests/golden/batch_invariance_test.cc
  ${PROJECT_SOURCE_DIR}/tests/support/model_harness.cc ${gpu}/cuda_test_backend.cc
  LIBS lorikeet_engine lorikeet_runner lorikeet_adapters_cache)
lorikeet_gpu_test(cuda_variants_test ${PROJECT_SOURCE_DIR}/tests/golden/variants_test.cc
  ${gpu}/cuda_test_backend.cc LIBS lorikeet_engine lorikeet_runner lorikeet_adapters_cache)
lorikeet_gpu_test(cuda_adapters_test ${gpu}/cuda_adapters_test.cc ${gpu}/cuda_mixture_test.cc
  LIBS lorikeet_kernels_cuda lorikeet_kernels_cpu)
lorikeet_gpu_test(cuda_engine_test ${gpu}/cuda_engine_test.cc ${gpu}/cuda_test_backend.cc
  ${PROJECT_SOURCE_DIR}/tests/support/model_harness.cc
  LIBS lorikeet_engine lorikeet_runner lorikeet_adapters_cache)
