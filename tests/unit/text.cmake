if(TARGET lorikeet_server_text)
  lorikeet_test(text_test
    ${CMAKE_CURRENT_LIST_DIR}/text_chat_template_test.cc
    ${CMAKE_CURRENT_LIST_DIR}/text_gguf_tokenizer_test.cc
    ${CMAKE_CURRENT_LIST_DIR}/text_stream_test.cc
    ${CMAKE_CURRENT_LIST_DIR}/text_tokenizer_test.cc
    LIBS lorikeet_server_text)
endif()
