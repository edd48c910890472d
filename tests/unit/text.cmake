lorikeet_test(text_test
  ${CMAKE_CURRENT_LIST_DIR}/text_tokenizer_test.cc
  LIBS lorikeet_server_text)
