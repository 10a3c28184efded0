// Stubs of what the example app uses of LiteRT's Kotlin API (com.google.ai.edge.litert:litert 2): signatures alone, after its published
// documentation and sources. Nothing of it runs.

package com.google.ai.edge.litert

import android.content.res.AssetManager

enum class Accelerator { NONE, CPU, GPU, NPU }

class Environment private constructor() : AutoCloseable {
    enum class Option { CompilerPluginLibraryDir, DispatchLibraryDir }

    override fun close() = throw NotImplementedError()

    companion object {
        @JvmStatic
        @JvmOverloads
        fun create(options: Map<Option, String> = mapOf()): Environment = throw NotImplementedError("$options")
    }
}

class TensorBuffer private constructor() : AutoCloseable {
    fun writeFloat(data: FloatArray): Unit = throw NotImplementedError("$data")

    fun writeInt8(data: ByteArray): Unit = throw NotImplementedError("$data")

    fun readInt(): IntArray = throw NotImplementedError()

    fun readFloat(): FloatArray = throw NotImplementedError()

    fun readInt8(): ByteArray = throw NotImplementedError()

    override fun close() = throw NotImplementedError()
}

class CompiledModel private constructor() : AutoCloseable {
    data class CpuOptions(val numThreads: Int? = null, val xnnPackFlags: Int? = null, val xnnPackWeightCachePath: String? = null)

    class Options(internal val accelerators: Set<Accelerator>) {
        constructor(vararg accelerators: Accelerator) : this(setOf(*accelerators))

        var cpuOptions: CpuOptions? = null

        companion object {
            @JvmStatic
            val CPU = Options(Accelerator.CPU)
        }
    }

    fun createInputBuffer(inputName: String, signature: String? = null): TensorBuffer = throw NotImplementedError("$inputName $signature")

    fun createOutputBuffer(outputName: String, signature: String? = null): TensorBuffer = throw NotImplementedError("$outputName $signature")

    fun run(inputs: Map<String, TensorBuffer>, outputs: Map<String, TensorBuffer>, signature: String? = null): Unit =
        throw NotImplementedError("$inputs $outputs $signature")

    override fun close() = throw NotImplementedError()

    companion object {
        @JvmStatic
        @JvmOverloads
        fun create(
            assetManager: AssetManager,
            assetName: String,
            options: Options = Options.CPU,
            optionalEnv: Environment? = null
        ): CompiledModel = throw NotImplementedError("$assetManager $assetName $options $optionalEnv")
    }
}
