# Programs that load the fronts; not tests.
if(TARGET lorikeet_server)
  foreach(program front_load front_compare)
    add_executable(${program} EXCLUDE_FROM_ALL ${CMAKE_CURRENT_LIST_DIR}/${program}.cc)
    target_include_directories(${program} PRIVATE ${PROJECT_SOURCE_DIR})
    target_link_libraries(${program} PRIVATE lorikeet_server)
  endforeach()
  target_link_libraries(front_compare PRIVATE GTest::gtest)  # http_client.h's
endif()
