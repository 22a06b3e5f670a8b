// Fibers: many stacks in one thread of the machine, switched by hand, so that a block's threads can run in any order.
// Used by cuda_on_cpu.h alone. A switch on x86-64 is fifteen instructions; elsewhere <ucontext.h>, which is slower.
// In gdb you should see a fiber's own backtrace, which ends at start_fiber.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)  // AddressSanitizer must be told which stack is in use
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace minireft::emulator {

struct Stack {  // a stack that is not running: where it stopped, and (for AddressSanitizer) where it lies
  void* top = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
};

inline Stack caller;            // the stack that the scheduler runs on
inline void (*body)() = nullptr;  // what a new fiber runs; it must not return

#if defined(__x86_64__)
// Saves what a callee must preserve, swaps the stack pointer, restores: to the compiler, an ordinary call.
__attribute__((naked, noinline)) inline void swap_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

inline void switch_stack(Stack& from, Stack& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if defined(__x86_64__)
  swap_stack(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

inline void start_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &caller.bottom, &caller.size);
#endif
  body();
  abort();
}

inline void new_fiber(Stack& fiber, char* memory, size_t size) {
  fiber.bottom = memory, fiber.size = size, fiber.fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, size);  // what an earlier fiber left behind
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + size) & ~uintptr_t(15)) - 2;
  top[0] = reinterpret_cast<void*>(start_fiber), top[1] = nullptr;  // the return address of swap_stack; then none
  for (int i = 1; i <= 6; i++) top[-i] = nullptr;                   // six registers
  fiber.top = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = memory, fiber.context.uc_stack.ss_size = size, fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, start_fiber, 0);
#endif
}

}  // namespace minireft::emulator
