lorikeet_test(churn_sim_test ${CMAKE_CURRENT_LIST_DIR}/churn_sim_test.cc
              LIBS lorikeet_scheduler LABELS sim)
lorikeet_test(scheduler_sim_test ${CMAKE_CURRENT_LIST_DIR}/scheduler_sim_test.cc
              LIBS lorikeet_scheduler LABELS sim)
lorikeet_test(image_runs_sim_test ${CMAKE_CURRENT_LIST_DIR}/image_runs_sim_test.cc
              LIBS lorikeet_scheduler LABELS sim)
lorikeet_test(tenants_sim_test ${CMAKE_CURRENT_LIST_DIR}/tenants_sim_test.cc
              LIBS lorikeet_scheduler LABELS sim)
