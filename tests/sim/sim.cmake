lorikeet_test(scheduler_sim_test ${CMAKE_CURRENT_LIST_DIR}/scheduler_sim_test.cc
              LIBS lorikeet_scheduler LABELS sim)
