lorikeet_test(kernels_test ${PROJECT_SOURCE_DIR}/tests/unit/kernels_test.cc
  LIBS lorikeet_kernels_cpu lorikeet_tensor)
lorikeet_test(experts_test ${PROJECT_SOURCE_DIR}/tests/unit/experts_test.cc
  LIBS lorikeet_kernels_cpu lorikeet_tensor)
# Of the CUDA backend, but these need none of it.
lorikeet_test(sample_plan_test ${PROJECT_SOURCE_DIR}/tests/unit/sample_plan_test.cc
  ${PROJECT_SOURCE_DIR}/engine/kernels/cuda/sample_plan.cc LIBS lorikeet_kernels)
lorikeet_test(adapter_image_test ${PROJECT_SOURCE_DIR}/tests/unit/adapter_image_test.cc
  ${PROJECT_SOURCE_DIR}/engine/kernels/cuda/adapter_image.cc
  ${PROJECT_SOURCE_DIR}/engine/kernels/cuda/adapter_parts.cc LIBS lorikeet_kernels)
