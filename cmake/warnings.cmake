# tq_set_warnings(target): the warnings every target of this project is held to. They are private:
# a project that links turboquant keeps its own.
function(tq_set_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:
    -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual
    $<$<BOOL:${TQ_WARNINGS_AS_ERRORS}>:-Werror>>)
endfunction()
