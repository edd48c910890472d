set(support ${PROJECT_SOURCE_DIR}/tests/support)
set(golden ${PROJECT_SOURCE_DIR}/tests/golden)
lorikeet_test(model_golden_test ${golden}/model_golden_test.cc ${support}/model_harness.cc
  ${support}/cpu_test_backend.cc
  LIBS lorikeet_runner lorikeet_adapters_cache)
lorikeet_test(real_model_test ${golden}/real_model_test.cc ${support}/model_harness.cc
  ${support}/cpu_test_backend.cc
  LIBS lorikeet_runner lorikeet_adapters_cache)
lorikeet_test(batch_invariance_test ${golden}/batch_invariance_test.cc ${support}/model_harness.cc
  ${support}/cpu_test_backend.cc
  LIBS lorikeet_engine lorikeet_runner lorikeet_adapters_cache)
lorikeet_test(prefix_cache_test ${golden}/prefix_cache_test.cc
  LIBS lorikeet_engine lorikeet_adapters_cache)
lorikeet_test(variants_test ${golden}/variants_test.cc ${support}/cpu_test_backend.cc
  LIBS lorikeet_engine lorikeet_runner lorikeet_adapters_cache)

lorikeet_test(shared_blobs_test ${golden}/shared_blobs_test.cc
  LIBS lorikeet_model lorikeet_adapters_cache)
if(TARGET lorikeet_server)
  lorikeet_test(merge_test ${golden}/merge_test.cc
    LIBS lorikeet_server lorikeet_engine lorikeet_runner)
  lorikeet_test(inspect_test ${golden}/inspect_test.cc LIBS lorikeet_server lorikeet_model lorikeet_adapters_cache)
endif()

# Not a test: prints how far `fast` moves a model's distributions.
add_executable(divergence ${golden}/divergence.cc ${support}/model_harness.cc
  ${support}/cpu_test_backend.cc)
target_link_libraries(divergence PRIVATE lorikeet_model lorikeet_kernels_cpu)
