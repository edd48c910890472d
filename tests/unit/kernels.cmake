lorikeet_test(kernels_test ${PROJECT_SOURCE_DIR}/tests/unit/kernels_test.cc
  LIBS lorikeet_kernels_cpu lorikeet_tensor)
# Of the CUDA backend, but needs none of it.
lorikeet_test(sample_plan_test ${PROJECT_SOURCE_DIR}/tests/unit/sample_plan_test.cc
  ${PROJECT_SOURCE_DIR}/engine/kernels/cuda/sample_plan.cc LIBS lorikeet_kernels)
