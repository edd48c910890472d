lorikeet_test(memory_test ${CMAKE_CURRENT_LIST_DIR}/memory_test.cc LIBS lorikeet_memory)
lorikeet_test(scheduler_test ${CMAKE_CURRENT_LIST_DIR}/scheduler_test.cc
  ${CMAKE_CURRENT_LIST_DIR}/scheduler_images_test.cc LIBS lorikeet_scheduler)
lorikeet_test(sampler_test ${CMAKE_CURRENT_LIST_DIR}/sampler_test.cc LIBS lorikeet_runner)
lorikeet_test(engine_test ${CMAKE_CURRENT_LIST_DIR}/engine_test.cc LIBS lorikeet_engine)
lorikeet_test(page_shares_test ${CMAKE_CURRENT_LIST_DIR}/page_shares_test.cc LIBS lorikeet_memory)
