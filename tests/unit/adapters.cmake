# Tests of adapters_cache.
set(adapters_support ${CMAKE_CURRENT_SOURCE_DIR}/unit/adapters_support.cc)
lorikeet_test(adapters_peft_test golden/adapters_peft_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache lorikeet_model)
lorikeet_test(adapters_load_test unit/adapters_load_test.cc unit/adapters_lowered_test.cc unit/module_tensors_test.cc unit/matrix_test.cc
  unit/adapters_store_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache)
lorikeet_test(adapters_gated_test unit/adapters_gated_test.cc unit/adapters_arrow_test.cc
  unit/adapters_mixlora_test.cc unit/adapters_mole_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache lorikeet_kernels_cpu)
lorikeet_test(adapters_registry_test unit/adapters_registry_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache)
lorikeet_test(adapters_tiers_test unit/adapters_tiers_test.cc unit/adapters_registry_file_test.cc
  ${adapters_support}
  LIBS lorikeet_adapters_cache)

# Not a test: prints how long calls to a large registry take.
add_executable(registry_latency unit/registry_latency.cc ${adapters_support})
target_include_directories(registry_latency PRIVATE ${PROJECT_SOURCE_DIR})
target_link_libraries(registry_latency PRIVATE lorikeet_adapters_cache)
