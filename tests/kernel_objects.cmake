# What the sources of the per-instruction-set kernels cannot promise by themselves is checked in the
# objects the compiler made of them:
#   encode_*      no fused multiply-add. Stored codes must be the same bits at every level, and
#                 g++ 12 forms FMADDSUB from an add beside a subtract in spite of
#                 -ffp-contract=off.
#   *_avx2, *_avx512   no weak symbol. The linker keeps one copy of a weak function for the whole
#                 program: it could be the one that portable callers cannot run.
# Run as cmake -DOBJECTS=... -DOBJDUMP=... -DNM=... -DSANITIZE=... -P kernel_objects.cmake
if(NOT OBJDUMP OR NOT NM)
  message("skipped: no objdump or nm")
  return()
endif()

set(bit_exact ${OBJECTS})
list(FILTER bit_exact INCLUDE REGEX "/(cpu/encode_|quant/|cache/(encode_append|dequantize))[^/]*$")
set(newer_isa ${OBJECTS})
list(FILTER newer_isa INCLUDE REGEX "/cpu/[a-z]+_avx[^/]*$")
if(NOT bit_exact)
  message(FATAL_ERROR "no encoder among the objects: ${OBJECTS}")
endif()

# x86: vfmadd132ps, vfnmsub..., vfmaddsub...; Arm: fmadd, fnmsub, fmla, fmls.
set(fused "[ \t](vfn?m(add|sub)[a-z0-9]+|fn?m(add|sub)|fml[as])[ \t]")
foreach(object IN LISTS bit_exact)
  execute_process(COMMAND ${OBJDUMP} -d --no-show-raw-insn ${object}
                  OUTPUT_VARIABLE code COMMAND_ERROR_IS_FATAL ANY)
  if(code MATCHES "${fused}")
    message(SEND_ERROR "${object} holds the fused multiply-add ${CMAKE_MATCH_1}")
  endif()
endforeach()

if(NOT SANITIZE)  # sanitizers add weak symbols of their own
  foreach(object IN LISTS newer_isa)
    execute_process(COMMAND ${NM} ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
    if(symbols MATCHES "[0-9a-f] [VWu] ([^\n]+)")
      message(SEND_ERROR "${object} defines the weak symbol ${CMAKE_MATCH_1}")
    endif()
  endforeach()
endif()
list(LENGTH bit_exact num_bit_exact)
list(LENGTH newer_isa num_newer_isa)
message("checked ${num_bit_exact} bit-exact objects, ${num_newer_isa} of newer instruction sets")
