# Tests of adapters_cache.
set(adapters_support ${CMAKE_CURRENT_SOURCE_DIR}/unit/adapters_support.cc)
lorikeet_test(adapters_peft_test golden/adapters_peft_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache lorikeet_model)
lorikeet_test(adapters_load_test unit/adapters_load_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache)
lorikeet_test(adapters_registry_test unit/adapters_registry_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache)
lorikeet_test(adapters_tiers_test unit/adapters_tiers_test.cc ${adapters_support}
  LIBS lorikeet_adapters_cache)
