// A program of scenes, of which it plays the one that it is told by name: what pool.cpp and memory.cpp have in common.
#pragma once
#include <cstdio>
#include <string>

#include "problem.h"

namespace native {

struct Scene {
  const char* name;
  void (*play)();
};

// What main returns; ends the program where there is no such scene.
template <size_t kCount>
int play(const char* program, const Scene (&scenes)[kCount], int count, char** arguments) {
  for (const Scene& scene : scenes) {
    if (count != 2 || std::string(arguments[1]) != scene.name) continue;
    scene.play();
    std::puts("done");
    return 0;
  }
  fail(std::string("expected: ") + program + " SCENE");
}

}  // namespace native
