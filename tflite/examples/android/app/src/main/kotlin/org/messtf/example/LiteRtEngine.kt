// LiteRT's CompiledModel as the runner's engine: a signature's output buffers are the input buffers of the next, on a GPU in its memory.

package org.messtf.example

import android.content.res.AssetManager
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.Environment
import com.google.ai.edge.litert.TensorBuffer

class LiteRtEngine(private val model: CompiledModel) : Engine<TensorBuffer> {
    private val tensors = ArrayList<TensorBuffer>()

    override fun input(signature: String, name: String): TensorBuffer = model.createInputBuffer(name, signature).also { tensors.add(it) }

    override fun output(signature: String, name: String): TensorBuffer = model.createOutputBuffer(name, signature).also { tensors.add(it) }

    override fun run(signature: String, inputs: Map<String, TensorBuffer>, outputs: Map<String, TensorBuffer>) =
        model.run(inputs, outputs, signature)

    // LiteRT's Kotlin has no functions for uint8; those for int8 copy bytes as they are.
    override fun write(tensor: TensorBuffer, bytes: ByteArray) = tensor.writeInt8(bytes)

    override fun write(tensor: TensorBuffer, floats: FloatArray) = tensor.writeFloat(floats)

    override fun readInt(tensor: TensorBuffer): Int = tensor.readInt()[0]

    override fun readFloats(tensor: TensorBuffer): FloatArray = tensor.readFloat()

    override fun readBytes(tensor: TensorBuffer): ByteArray = tensor.readInt8()

    override fun close() {
        for (tensor in tensors) tensor.close()
        model.close()
    }

    companion object {
        /** Opens and warms up the bundle in a folder of the assets. On a GPU, what it cannot run stays on the CPU. */
        fun open(assets: AssetManager, folder: String, environment: Environment, gpu: Boolean, threads: Int): Runner<TensorBuffer> {
            fun text(name: String) = assets.open("$folder/$name").bufferedReader().use { it.readText() }
            val options = if (gpu) CompiledModel.Options(Accelerator.GPU, Accelerator.CPU) else CompiledModel.Options(Accelerator.CPU)
            options.cpuOptions = CompiledModel.CpuOptions(numThreads = threads)
            val model = CompiledModel.create(assets, "$folder/model.tflite", options, environment)
            return Runner(Description(text("manifest.json"), text("signatures.json")), LiteRtEngine(model))
        }
    }
}
