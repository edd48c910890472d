lorikeet_test(kernels_test ${PROJECT_SOURCE_DIR}/tests/unit/kernels_test.cc
  LIBS lorikeet_kernels_cpu lorikeet_tensor)
