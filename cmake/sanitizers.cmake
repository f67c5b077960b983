# TQ_SANITIZE applies to every object of the build: mixing instrumented and plain standard-library
# containers gives false reports.
if(TQ_SANITIZE)
  string(REPLACE ";" "," tq_sanitizers "${TQ_SANITIZE}")
  add_compile_options(-fsanitize=${tq_sanitizers} -fno-omit-frame-pointer
                      -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${tq_sanitizers})
endif()
