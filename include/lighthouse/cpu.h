// The verbs on the CPU, in host memory.
//
// Sums are made in float32 (float64 for float64) in an order that depends on nothing but the sequences, so the same
// input gives the same bits for any executor and any CPU of one architecture.
// Errors: std::invalid_argument, before anything is written.
#pragma once

#include "lighthouse/executor.h"
#include "lighthouse/verbs.h"

namespace lighthouse::cpu {

void run(const ScoreArgs& args, const Executor& executor);
void run(const SelectArgs& args, const Executor& executor);
void run(const GatherArgs& args, const Executor& executor);
void run(const GatherBackwardArgs& args, const Executor& executor);
void run(const ScatterArgs& args, const Executor& executor);
void run(const ScatterBackwardArgs& args, const Executor& executor);

// Throws unless mask and prefix are a choice that fills the sequences' entries exactly: for arrays from outside, once,
// since the verbs follow them without looking.
void check_selection(const ConstSelection& selection, const Executor& executor);

}  // namespace lighthouse::cpu
